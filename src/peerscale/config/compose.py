"""YAML files and overrides -> one nested mapping, composed by Hydra, which is imported only when needed."""

import contextlib
import functools
import itertools
import os
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, Self

from peerscale.errors import ConfigError
from peerscale.files import OURS, ROOT

STUDY = ".study"
"""Suffix of the names under which studies are registered in Hydra, so that Hydra does not read a study's file
itself."""

REGISTERED: dict[str, tuple[Path, int, int]] = {}
"""For each registered name: the study's file, its modification time and its size."""


SECTIONS = ("sweep", "slurm")
"""Sections of a study, besides its cells' configuration, that can be overridden: which cells, and where they run."""


class Composition(NamedTuple):
    """What Hydra composed, not yet checked against the dataclasses."""

    tree: dict[str, Any]
    """Plain nested values."""
    choices: dict[str, str]
    """The file of each group of conf/ that was chosen, such as `ffn: peer`."""

    @classmethod
    def of(cls, tree: Any, choices: Mapping[str, Any]) -> Self:
        """From Hydra's tree and choices, without its own groups such as `hydra/launcher`."""
        ours = {str(group): str(choice) for group, choice in choices.items() if not str(group).startswith("hydra/")}
        return cls({str(key): value for key, value in tree.items()}, ours)


def of_section(override: str, section: str) -> bool:
    """Whether an override changes this one of the `SECTIONS`, as `sweep.methods=[peer]` changes `sweep`."""
    return override.lstrip("+").startswith(f"{section}.") and "=" in override


def of_cells(overrides: Sequence[str]) -> list[str]:
    """The overrides of a study that change the configuration of its cells."""
    return [override for override in overrides if not any(of_section(override, section) for section in SECTIONS)]


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


def sweep_file(sweep: str | Path) -> Path:
    """The file of a study given by name or path; raises `ConfigError`, which lists the studies there are."""
    path = Path(sweep)
    if path.suffix not in (".yaml", ".yml"):
        path = next((file for file in study_files() if file.stem == str(sweep)), Path(f"{sweep}.yaml"))
    if not path.is_file():
        known = ", ".join(file.stem for file in study_files())
        raise ConfigError(f"no sweep file {path.name}; in sweeps/ there are: {known or 'none'}")
    return path.resolve()


def study_files() -> list[Path]:
    """The studies in `sweeps/`: the user's own and ours, by name."""
    files = {path.stem: path for folder in (OURS, ROOT) for path in (folder / "sweeps").glob("*.yaml")}
    return [files[name] for name in sorted(files)]


def read_study(file: Path) -> dict[str, Any]:
    """The contents of a study's file, not yet laid over conf/; raises `ConfigError` if it is not a study."""
    from omegaconf import OmegaConf

    try:
        study = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except UnicodeDecodeError:
        raise ConfigError(f"{file.name} is not UTF-8 text") from None
    except OSError as error:
        if error.errno is not None:  # not OmegaConf's own, about a file that holds a number
            raise
        raise ConfigError(f"{file.name}: input should be a mapping with a `sweep:` section") from None
    if not isinstance(study, dict):
        raise ConfigError(f"{file.name}: input should be a mapping with a `sweep:` section, not a list")
    hydra = study.pop("hydra", None) or {}
    if not isinstance(hydra, dict) or {*hydra} - {"mode"}:  # `hydra.mode` was once required; it has no effect now
        raise ConfigError(f"{file.name}: a study may not set hydra, since it could run code")
    if not isinstance(defaults := study.get("defaults", []), list):
        raise ConfigError(f"{file.name}: defaults: input should be a list, not {defaults!r}")
    return {str(key): value for key, value in study.items()}


def compose(overrides: Sequence[str] = (), *, sweep: str | Path | None = None, name: str = "config") -> Composition:
    """Compose conf/, with a study's settings laid over it and the overrides over both.

    Args:
        overrides: in Hydra's grammar, such as `["ffn=peer", "optim.lr=0.01"]`.
        sweep: a study's name or file.
        name: the file of conf/ to start from, if there is no study.

    Raises:
        Exception: of Hydra, OmegaConf or YAML; `config_errors.first_line` turns it into one line.
    """
    if sweep is not None:
        return _composed(_register(sweep), overrides)
    found = (file for folder in (OURS / "conf", *own_folders()) for file in sorted(folder.rglob("*.yaml")))
    files = [file for file in found if file.is_file()]  # an editor may keep a link to nowhere beside a file
    return deepcopy(_kept(name, tuple(overrides), tuple((file, file.stat().st_mtime_ns) for file in files)))


def own_folders() -> list[Path]:
    """The user's own `conf/` folders, in the current folder and in the folders of PYTHONPATH."""
    folders = dict.fromkeys([".", *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return [conf for folder in folders if folder and (conf := Path(folder, "conf").resolve()).is_dir()]


@functools.lru_cache(maxsize=1000)
def _kept(name: str, overrides: tuple[str, ...], files: Hashable) -> Composition:
    """Cached until a file of conf/ changes: Hydra takes 80 ms, and planning composes the same things repeatedly."""
    return _composed(name, overrides)


def _composed(name: str, overrides: Sequence[str]) -> Composition:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import get_gh_backup, restore_gh_from_backup
    from omegaconf import OmegaConf, open_dict

    running = get_gh_backup()  # a cell may be composed while Hydra runs, and only one Hydra may run at a time
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(OURS / "conf"), version_base="1.3"):
            composed = hydra_compose(name, overrides=list(overrides), return_hydra_config=True)
    finally:
        restore_gh_from_backup(running)
    choices = composed.hydra.runtime.choices
    with open_dict(composed):
        del composed["hydra"]
    return Composition.of(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True), choices)


def _register(sweep: str | Path) -> str:
    """Register a study with Hydra and return the name under which Hydra composes it.

    Its settings are laid over `conf/config.yaml`, unless its `defaults` name another file to lay them over.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    file = sweep_file(sweep)
    name, version = f"{file.stem}{STUDY}", (file, file.stat().st_mtime_ns, file.stat().st_size)
    if REGISTERED.get(name) == version:  # a plan composes a study once for each layer and size
        return name
    study = read_study(file)
    defaults = study.get("defaults", [])
    bases = [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    node = {
        **study,
        "defaults": [*([] if bases else ["config"]), *defaults, *([] if "_self_" in defaults else ["_self_"])],
        # Files named in its `defaults` may lie beside the study's file.
        "hydra": {"searchpath": [f"file://{file.parent}"] if defaults else []},
    }
    ConfigStore.instance().store(name, OmegaConf.create(node), provider=str(file))
    REGISTERED[name] = version
    return name
