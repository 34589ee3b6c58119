"""The GPU backend: through Triton's interpreter, in a process of its own, since it interprets all kernels or none.

Where there is a GPU it runs on that instead.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="there is no package triton: pip install 'peerscale[gpu]'")

HERE = Path(__file__).parent
# The two largest shapes and the hundreds of calls of gradcheck would take the interpreter minutes.
SELECTION = "triton and not gradcheck and not 400 and not Pkm and not 0.0001"
SHARED = ["test_operators.py", "test_row_sparse_adamw.py", "-k", SELECTION]


@pytest.mark.parametrize("cases", [SHARED, ["triton_cases.py"]], ids=["shared", "own"])
def test_cases(cases):
    runs_on = {"PEERSCALE_TEST_DEVICE": "cuda"} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *cases]
    result = subprocess.run(command, cwd=HERE, env=os.environ | runs_on, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 5 and "skipped" not in result.stdout


@pytest.mark.parametrize("real", ["fp32", "fp64"])
@pytest.mark.parametrize("kernel", ["row_dot_products", "weighted_row_sum", "table_gradient", "adamw_rows"])
def test_compiles_for_a_gpu(monkeypatch, tmp_path, kernel, real):
    """To machine code of an H100, which needs none; the interpreter lets more pass than the compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peerscale.kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"BY_ROW": True, "BLOCK_P": 4, "BLOCK_D": 256, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    numbers = {"P": "i32", "J": "i32", "D": "i32", "PAIRS_A_ROW": "i32"}
    integers = dict.fromkeys(("rows", "order", "starts"), "*i64")
    vectors = dict.fromkeys(("x", "table", "vectors", "mean", "square"), "*bf16" if real == "fp32" else "*fp64")
    function = getattr(triton_kernels, kernel)
    while not isinstance(function, triton.JITFunction):
        function = function.fn
    names = function.arg_names
    known = {**integers, **numbers, **vectors, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known.get(name, f"*{real}") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    assert len(compiled.asm["cubin"]) > 1000
