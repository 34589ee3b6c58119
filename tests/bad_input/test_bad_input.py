"""Wrong input of every kind: one clear line, the exit code of a user's error, and nothing half-written.

The cases lie in the YAML files beside this one:

    given: what is in the folder first, a function of `given.py`
    files: further files, name and text; links such as `cell` and `study` lead into what was given
    sweep: the `sweep` section of toy.yaml, `settings` what else it says
    run: the program and its words; {here} is the folder, {tiny} a cell that trains in a second, {runs} the two folders
    says: the line on stderr, less `error: `
    code: of the exit, if not 2
"""

import re
import shutil
from pathlib import Path
from typing import Any

import given
import pytest
import yaml

from peerscale.files import ROOT
from programs import MODULES, SCRIPTS, call, call_as_process
from toy_study import write_study

HERE = Path(__file__).parent
CASES = [
    pytest.param(case, id=f"{file.stem}-{number}")
    for file in sorted(HERE.glob("*.yaml"))
    for number, case in enumerate(yaml.safe_load(file.read_text()))
]
PROGRESS = re.compile(r"(notice: |single \d/1 ).*|.* failed: .*|")
"""What may stand above the error."""


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `given` makes, once; all cases have the same folder, as it may hold its own path."""
    return tmp_path_factory.mktemp("given")


@pytest.fixture
def here(kept: Path) -> Path:
    """An empty folder."""
    folder = kept / "here"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def prepare(case: dict[str, Any], here: Path) -> str:
    """Lay out the folder; returns the command line."""
    if "given" in case:
        original = here.with_name(case["given"])
        if not original.exists():
            getattr(given, case["given"])(here)
            here.rename(original)
        shutil.copytree(original, here, symlinks=True, dirs_exist_ok=True)
    if "sweep" in case:
        write_study(here, case["sweep"], case.get("settings", "").replace("{here}", str(here)))
    for name, text in case.get("files", {}).items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text.replace("{here}", str(here)))
    line = case["run"].replace("{runs}", "--runs {here}/runs --results {here}/results")
    line = line.replace("{tiny}", " ".join([*given.TINY, *given.places(here)]))
    if line.startswith("train") and "trainer.runs_directory" not in line:
        line += " trainer.runs_directory={here}/runs data.directory={here}/data"
    return line.replace("{here}", str(here))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but locks, which stay as they say nothing."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_refused(case: dict[str, Any], code: int, errors: str, here: Path) -> None:
    *before, last = errors.rstrip("\n").split("\n")
    if before and before[0].startswith("usage: "):  # argparse's, as Hydra leaves it
        assert last.partition(": ")[2] == f"error: {case['says']}" and code == 2
        return
    expected = case["says"]
    for folder, between in (("conf/ffn", " "), ("sweeps", ", ")):
        names = sorted(file.stem for file in (ROOT / folder).glob("*.yaml"))
        expected = expected.replace(f"{{{folder}}}", between.join(names))
    # In a cell's name a path has other separators.
    last = last.replace(str(here), "{here}").replace(str(here).strip("/").replace("/", "_"), "{here}")
    assert last == f"error: {expected}"
    assert [line for line in before if not PROGRESS.fullmatch(line)] == []
    assert code == case.get("code", 2)


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(case: dict[str, Any], here: Path) -> None:
    line = prepare(case, here)
    before = contents(here)
    result = call(line)
    assert_refused(case, result.code, result.err, here)
    after = contents(here)
    written = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    # What was whole before the error may stay: a corpus that is prepared, a notice of a failed cell.
    assert {name for name in written if not re.match(case.get("keeps", "^$"), name)} == set()


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].get("process")])
def test_so_it_is_for_a_process_of_its_own(case: dict[str, Any], here: Path) -> None:
    result = call_as_process(prepare(case, here))
    assert_refused(case, result.code, result.err, here)


def test_there_are_cases_of_every_program() -> None:
    assert len(CASES) >= 40
    assert {case.values[0]["run"].split()[0] for case in CASES} == {*MODULES, *SCRIPTS}
