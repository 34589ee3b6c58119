"""The GPU backend: through Triton's interpreter, in a process of its own, since it interprets all kernels or none.

Where there is a GPU it runs on that instead.
"""

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peerscale.ops.triton_operators import blocks_of, cross_entropy_blocks, search_constants

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


CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 232_448}  # bytes that a program may have
SPILLED = 16
"""Bytes of registers that a thread may spill to memory."""

ROWS = [
    (kernel, blocks_of(width), real)
    for kernel in ("row_dot_products", "weighted_row_sum", "table_gradient")
    for width in (64, 128, 768)
    for real in ("fp32", "bf16")
]
HEADS = [("cross_entropy", cross_entropy_blocks(V), real) for V in (100, 2048, 32_768) for real in ("fp32", "bf16")]
SEARCHES = list(itertools.product((4, 16, 32, 64), ("tf32x3", "tf32", "bf16"), SHARED_MEMORY))
# An assembler takes up to half a minute for a search: all of them with EVERY_KERNEL=1.
SHORTER = [(16, "tf32x3", 90), (4, "tf32", 80), (4, "bf16", 80)]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_every_configuration_on_rows_and_logits_compiles_for_a_gpu(architecture, monkeypatch, tmp_path):
    """To machine code of an A100 and an H100, which needs none; the interpreter lets more pass than the compiler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, constants, real in [*ROWS, *HEADS]:
        assert spilled(kernel, constants, real, architecture, tmp_path) <= SPILLED, (kernel, constants, real)


@pytest.mark.parametrize(
    ("top_k", "kind", "architecture"), SEARCHES if os.environ.get("EVERY_KERNEL") else SHORTER, ids=str
)
def test_searches_compile_for_a_gpu(top_k, kind, architecture, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    real = "bf16" if kind == "bf16" else "fp32"
    constants = search_constants(torch.bfloat16 if kind == "bf16" else torch.float32, 1024, 64, 1, top_k)
    if kind != "bf16":
        constants["PRECISION"] = kind
    assert spilled("product_key_top_k", constants, real, architecture, tmp_path) <= SPILLED


def spilled(kernel, constants, real, architecture, folder):
    """Bytes of memory that a thread of the compiled kernel needs, for registers above all."""
    options = {name: value for name, value in constants.items() if name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in constants.items() if name not in options}
    module = "triton_top_k" if kernel == "product_key_top_k" else "triton_kernels"
    function = getattr(importlib.import_module(f"peerscale.ops.{module}"), kernel)
    names = function.arg_names
    # Sums, losses and what belongs to pairs are float32 beside half precision.
    known = dict.fromkeys(("rows", "order", "starts", "targets"), "*i64")
    known |= dict.fromkeys(("x", "table", "vectors", "query", "sub_keys", "logits"), f"*{real}")
    known |= dict.fromkeys(("P", "J", "D", "V", "tokens"), "i32") | {"scale": "fp32"}
    known |= dict.fromkeys(constants, "constexpr")
    signature = {name: known.get(name, "*fp32") for name in names}
    source = triton.compiler.ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        # As the arguments of models are: pointers, and widths.
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name][0] == "*" or name in ("J", "D", "V")},
    )  # fmt: skip
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]
    (folder / "cubin").write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", folder / "cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = [int(size) for size in re.findall(r"STACK:(\d+)", usage)]
    assert stack, usage
    return sum(stack)
