"""The published values; the data are not part of this repository."""

import os
from pathlib import Path

import pytest
from synthetic_study import script

from peerscale.errors import exit_code

validate = script("validate")
DATA = os.environ.get("PEERSCALE_VALIDATION_DATA")


@pytest.mark.skipif(not DATA, reason="PEERSCALE_VALIDATION_DATA names no folder with the published runs")
def test_every_published_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main([DATA]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed and all(name in printed for name in ("E1", "E9", "Llama 3", "Clark", "Krajewski"))


def test_a_value_outside_its_tolerance_fails() -> None:
    check = validate.Check
    assert check("x", 1.05, 1.0, 0.1).passed and not check("x", 1.2, 1.0, 0.1).passed
    assert check("x", 0.9, 1.0, sign="<=").passed and not check("x", 1.1, 1.0, sign="<=").passed
    assert check("x", 1.1, 1.0, sign=">").passed and not check("x", float("nan"), 1.0, 0.1).passed
    assert "FAIL" in str(check("x", 2.0, 1.0)) and "pass" in str(check("x", 1.0, 1.0))


def test_the_generated_design() -> None:
    runs, law = validate.granular_design()
    assert (len(runs), runs["N"].min(), runs["N"].max()) == (78, 135266304, 3652190208)
    assert runs["F"].iloc[0] == pytest.approx(3.16669952e17)
    assert runs["loss"].iloc[0] == pytest.approx(3.789626, abs=1e-6) and law.gamma == 0.58


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: validate.main([str(tmp_path)])) == 2
    assert "no chinchilla_epoch_svg.csv" in capsys.readouterr().err
