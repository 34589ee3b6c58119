"""YAML files and overrides -> one nested mapping, composed by Hydra, which is imported only when needed."""

import contextlib
import itertools
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from peerscale.config.errors import ConfigError, hydra_errors
from peerscale.files import OURS, ROOT

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
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not UTF-8 text") from None
    with hydra_errors(path.name):
        loaded: Any = None
        with contextlib.suppress(AssertionError):  # OmegaConf's, about a file that holds a number
            loaded = OmegaConf.create(text)
        if not isinstance(loaded, DictConfig) or not isinstance(loaded.get("sweep"), DictConfig):
            raise ConfigError(f"{path.name}: input should be a mapping with a `sweep:` section")
        section: Any = OmegaConf.to_container(loaded.sweep, resolve=True)
        settings: Any = OmegaConf.to_container(loaded)
    if absent := [key for key, value in leaves(settings) if value == "???"]:
        raise ConfigError(f"{path.name}: {absent[0]}: ??? is no value")
    del settings["sweep"]
    defaults = settings.pop("defaults", [])
    if "hydra" in settings:
        raise ConfigError(f"{path.name}: a study may not set hydra, since it could run code")
    if not isinstance(defaults, list):
        raise ConfigError(f"{path.name}: defaults: input should be a list, not {defaults!r}")
    return StudyFile(path=path, defaults=defaults, settings=settings, sweep=section)


def composed(
    overrides: Sequence[str] = (), *, study: StudyFile | None = None, name: str = "config", resolve: bool = True
) -> Composition:
    """Compose conf/, with a study's settings laid over it and the overrides over both.

    Args:
        overrides: in Hydra's grammar, such as `["ffn=peer", "optim.lr=0.01"]`.
        study: its `sweep` section is left out.
        name: the file of conf/ to start from, if there is no study.
        resolve: replace interpolations by the values that they have here.

    Raises:
        ConfigError: an unknown file or key, or wrong grammar.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import get_gh_backup, restore_gh_from_backup
    from omegaconf import OmegaConf, open_dict

    if study is not None:
        name = f"{study.path.stem}.study"  # not the name of a file, which Hydra would read
        chosen = [entry for entry in study.defaults if entry not in ("config", "_self_")]
        node = {**study.settings, "defaults": ["config", *chosen, "_self_"]}
        ConfigStore.instance().store(name, OmegaConf.create(node), provider=str(study.path))
    running = get_gh_backup()  # a cell may be composed while Hydra runs, and only one Hydra may run at a time
    GlobalHydra.instance().clear()
    try:
        with hydra_errors(), initialize_config_dir(str(OURS / "conf"), version_base="1.3"):
            config = compose(name, overrides=list(overrides), return_hydra_config=True)
            choices = config.hydra.runtime.choices
            with open_dict(config):
                del config["hydra"]
            return Composition.of(OmegaConf.to_container(config, resolve=resolve, throw_on_missing=True), choices)
    finally:
        restore_gh_from_backup(running)


def resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with its interpolations replaced by the values that they have in it; raises `ConfigError`."""
    from omegaconf import OmegaConf

    with hydra_errors():
        plain: Any = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True)
    return plain


def overridden(overrides: Sequence[str], section: str | None = None) -> dict[str, Any]:
    """The values of the overridden keys of one of the `SECTIONS`, without its name; or else those of all other keys.

    Raises:
        ConfigError: wrong grammar; in a section, a key that is removed or given twice.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values: dict[str, Any] = {}
    with hydra_errors():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:
        head, _, key = override.key_or_group.partition(".")
        if (head if head in SECTIONS else None) != section:
            continue
        if section is None:
            values[override.key_or_group] = override.value()
        elif not key or override.is_delete():
            raise ConfigError(
                f"{override.input_line}: the keys of {section} are changed one by one: {section}.KEY=VALUE"
            )
        elif key in values:
            raise ConfigError(
                f"{section}.{key} is given twice; a value in braces needs quotes: \"'{section}.{key}=...'\""
            )
        else:
            values[key] = override.value()
    return values


def of_cells(overrides: Sequence[str]) -> list[str]:
    """The overrides of a study that change the configuration of its cells, and none of the `SECTIONS`."""
    return [word for word in overrides if overridden([word])]


def leaves(tree: Mapping[str, Any], without: Container[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys that have values, `without` some keys or sections, each with its value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in without:
            continue
        if isinstance(value, Mapping):
            yield from leaves(value, without, f"{key}.")
        else:
            yield key, value


def value_at(tree: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key; `default` if there is none or it is a whole section."""
    value: Any = tree
    for name in key.split("."):
        value = value.get(name, default) if isinstance(value, Mapping) else default
    return default if isinstance(value, Mapping) else value


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key; whether there may be such a key is checked when the tree is parsed."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(tree.setdefault(section, {}), dict):
            raise ConfigError(f"{key}: {section} has no keys")
        tree = tree[section]
    tree[name] = value


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


def own_folders() -> list[Path]:
    """The user's own `conf/` folders, in the current folder and in the folders of PYTHONPATH."""
    folders = dict.fromkeys([".", *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return [conf for folder in folders if folder and (conf := Path(folder, "conf").resolve()).is_dir()]
