"""The files of studies: where they lie, and what is in one."""

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peerscale.config.errors import ConfigError, hydra_errors, nearest
from peerscale.files import OURS, ROOT
from peerscale.types import FILE_NAME


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyFile:
    """The contents of a study's file."""

    path: Path
    defaults: list[Any]
    """Choices of files in conf/, as in Hydra's `defaults`."""
    settings: dict[str, Any]
    """Keys of the configuration, for every cell; interpolations are not resolved yet."""
    sweep: dict[str, Any]
    """The section that says which cells there are."""


def read_study(sweep: str | Path) -> StudyFile:
    """Read the file of a study given by name or path; raises `ConfigError` if it is not a study."""
    from omegaconf import DictConfig, OmegaConf

    path = sweep_file(sweep)
    sweep_name(path.stem)
    try:
        with hydra_errors(path.name):
            loaded = OmegaConf.load(path)
            if not isinstance(loaded, DictConfig) or not isinstance(loaded.get("sweep"), DictConfig):
                raise ConfigError(f"{path.name}: input should be a mapping with a `sweep:` section")
            section: Any = OmegaConf.to_container(loaded.sweep, resolve=True)
            settings: Any = OmegaConf.to_container(loaded)
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path.name}: {error}") from None
    del settings["sweep"]
    settings.pop("hydra", None)  # Hydra's own settings could run code
    defaults = settings.pop("defaults", None) or []
    if not isinstance(defaults, list) or not all(isinstance(entry, str | dict) for entry in defaults):
        raise ConfigError(f"{path.name}: defaults should be a list of choices, such as [override data: text]")
    return StudyFile(path=path, defaults=defaults, settings=settings, sweep=section)


def sweep_name(name: str) -> str:
    """The name of a study, checked; raises `ConfigError` if it can be no folder's name."""
    try:
        return FILE_NAME.validate_python(name)
    except ValidationError as error:
        raise ConfigError(f"the name of a study, {name!r}: {error.errors()[0]['msg']}") from None


def sweep_file(sweep: str | Path) -> Path:
    """The file of a study given by name or path; raises `ConfigError`, which lists the studies there are."""
    path = Path(sweep)
    if path.suffix not in (".yaml", ".yml"):
        path = next((file for file in study_files() if file.stem == str(sweep)), Path(f"{sweep}.yaml"))
    if not path.is_file():
        known = [file.stem for file in study_files()]
        there = ", ".join(known) or "none"
        raise ConfigError(f"no sweep file {path.name}; in sweeps/ there are: {there}{nearest(path.stem, known)}")
    return path.resolve()


def study_files() -> list[Path]:
    """The studies in `sweeps/`: the user's own and ours, by name."""
    files = {path.stem: path for folder in (OURS, ROOT) for path in (folder / "sweeps").glob("*.yaml")}
    return [files[name] for name in sorted(files)]


def sweep_text(sweep: str) -> str:
    """The text of a study's file; empty if the study has no file, such as a renamed one."""
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        return sweep_file(sweep).read_text(encoding="utf-8")
    return ""


def header(text: str) -> dict[str, str]:
    """The opening comment of a study's file, by keyword: `# Question: ...`, which may continue on further lines."""
    entries: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: line.startswith("# "), text.splitlines()):
        word, colon, rest = line.lstrip("# ").partition(": ")
        starts = bool(colon) and word.isalpha() and word.istitle()
        key = word if starts else next(reversed(entries), "Question")
        entries[key] = f"{entries.get(key, '')} {rest if starts else line.lstrip('# ')}".strip()
    return entries
