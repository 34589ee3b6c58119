"""What the environment of a record says of MKL."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peerscale.config.schema import TrainerConfig
from peerscale.files import PACKAGE
from peerscale.train.environment import changed_keys, describe

PRODUCT = """
import torch
from peerscale.config.schema import TrainerConfig
from peerscale.train.environment import describe
torch.manual_seed(0)
a, b = torch.randn(64, 4096), torch.randn(4096, 64)
error = ((a @ b).double() - a.double() @ b.double()).abs().max().item()
print(describe("cpp", torch.device("cpu"), TrainerConfig())["mkl"], error < 1e-3)
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_record_says_that_mkl_takes_the_processor_for_intels(tmp_path: Path) -> None:
    library = tmp_path / "mkl_avx512.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, PACKAGE / "ops" / "mkl_avx512.c"], check=True)
    for preloaded, expected in ((f"LD_PRELOAD={library}", "avx512 True"), ("NOTHING=", "None True")):
        command = ["env", preloaded, sys.executable, "-c", PRODUCT]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == expected


def test_records_from_before_are_of_mkl_as_it_is() -> None:
    here = describe("cpp", torch.device("cpu"), TrainerConfig())
    before = {key: value for key, value in here.items() if key != "mkl"}
    assert changed_keys(before, here) == []
    assert changed_keys(before, {**here, "mkl": "avx512"}) == changed_keys({**here, "mkl": "avx512"}, here) == ["mkl"]
