"""Energy counters, on a folder laid out as Linux does."""

from pathlib import Path

import pytest

from peerscale.runs import machine


def package(folder: Path, name: str, used: int, limit: int = 1000) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{used}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")


def test_energy_is_summed_over_processors_whose_counters_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "POWERCAP", tmp_path)
    package(tmp_path, "intel-rapl:0", 100)
    package(tmp_path, "intel-rapl:1", 900)
    package(tmp_path, "intel-rapl:0:0", 50)  # a part of the first
    before = machine.energy_counters()
    package(tmp_path, "intel-rapl:0", 400)
    package(tmp_path, "intel-rapl:1", 150)
    package(tmp_path, "intel-rapl:0:0", 350)
    assert machine.energy_j(before, machine.energy_counters()) == pytest.approx((300 + 250) / 1e6)


def test_a_machine_that_does_not_tell_has_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "POWERCAP", tmp_path)
    assert machine.energy_counters() is None
    (tmp_path / "intel-rapl:0").mkdir()  # and its files are not readable
    assert machine.energy_counters() is None
    assert machine.energy_j(None, None) is None
