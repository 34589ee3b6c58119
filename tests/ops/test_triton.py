"""The GPU backend: through Triton's interpreter, in a process of its own, since it interprets all kernels or none.

Where there is a GPU it runs on that instead.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="there is no package triton: pip install 'peerscale[gpu]'")

HERE = Path(__file__).parent
# The two largest shapes and all of both layers would take the interpreter minutes.
SELECTION = "triton and not 400 and not Pkm and not 0.0001 and not triton-adamw and not too_small and not follows"
SELECTION += " and not rms_norm and not rotary and not 262145"
SHARED = ["test_operators.py", "test_row_sparse_adamw.py", "test_rounded.py", "test_backbone.py", "-k", SELECTION]


@pytest.mark.parametrize("cases", [SHARED, ["triton_cases.py"]], ids=["shared", "own"])
def test_cases(cases):
    runs_on = {"PEERSCALE_TEST_DEVICE": "cuda"} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *cases]
    result = subprocess.run(command, cwd=HERE, env=os.environ | runs_on, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 5 and "skipped" not in result.stdout


KERNELS = ["row_dot_products", "weighted_row_sum", "table_gradient", "cross_entropy", "product_key_top_k"]
FILES = {"product_key_top_k": "triton_top_k"}  # of kernels that are not in triton_kernels
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 232_448}  # bytes that a program may have


# The search takes as long to compile as all others together, so each kind of it is compiled for one of the two.
@pytest.mark.parametrize(
    ("real", "architecture", "kernels"),
    [("fp32", 80, KERNELS[:4]), ("fp32", 90, KERNELS), ("bf16", 80, KERNELS), ("bf16", 90, KERNELS[:4])],
)
def test_compiles_for_a_gpu(monkeypatch, tmp_path, real, architecture, kernels):
    """To machine code of an A100 and an H100, which needs none; the interpreter lets more pass than the compiler.

    No register may be spilled to memory.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peerscale.ops.triton_operators import blocks_of, search_constants

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[real]
    found = {}
    for kernel in kernels:
        constants = blocks_of(768) | {"BLOCK_V": 4096}
        if kernel == "cross_entropy":
            constants["num_warps"] = 8
        if kernel in FILES:
            # For an A100 a smaller one, since its assembler takes half a minute for the top 16.
            constants = search_constants(dtype, 1024, 192, 1, 16 if architecture == 90 else 4)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        function = getattr(importlib.import_module(f"peerscale.ops.{FILES.get(kernel, 'triton_kernels')}"), kernel)
        names = function.arg_names
        # Sums and what belongs to pairs are float32 beside half precision.
        known = dict.fromkeys(("rows", "order", "starts", "targets"), "*i64")
        known |= dict.fromkeys(("x", "table", "vectors", "query", "sub_keys", "logits"), f"*{real}")
        known |= dict.fromkeys(("P", "J", "D", "V", "tokens"), "i32") | {"scale": "fp32"}
        known |= dict.fromkeys(constants, "constexpr")
        signature = {name: known.get(name, "*fp32") for name in names}
        source = ASTSource(
            fn=function,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
            # As the arguments of models are: pointers, and widths.
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                   if signature[name][0] == "*" or name in ("J", "D", "V")},
        )  # fmt: skip
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
        (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", tmp_path / "cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack = [int(size) for size in re.findall(r"STACK:(\d+)", usage)]
        found[kernel] = (sum(stack), compiled.metadata.shared <= SHARED_MEMORY[architecture])
        assert stack, usage
    assert found == dict.fromkeys(found, (0, True))
