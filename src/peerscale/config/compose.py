"""YAML files and overrides -> one nested mapping, composed by Hydra, which is imported only when needed."""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from peerscale.config.errors import ConfigError, hydra_errors
from peerscale.config.study_file import StudyFile
from peerscale.files import OURS

SECTIONS = ("sweep.", "slurm.")
"""Overrides of a study that do not change the configuration of its cells: which cells, and where they run."""


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


def composed(overrides: Sequence[str] = (), *, study: StudyFile | None = None, resolve: bool = True) -> Composition:
    """Compose conf/, with a study's settings laid over it and the overrides over both.

    Args:
        overrides: in Hydra's grammar, such as `["ffn=peer", "optim.lr=0.01"]`.
        study: its `sweep` section is left out.
        resolve: replace interpolations by the values that they have here.

    Raises:
        ConfigError: an unknown file or key, or wrong grammar.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import get_gh_backup, restore_gh_from_backup
    from omegaconf import OmegaConf, open_dict

    name = "config"
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


def overridden(overrides: Sequence[str]) -> dict[str, Any]:
    """The keys and groups that overrides change, with their values; raises `ConfigError` for wrong grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with hydra_errors():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.key_or_group: override.value() for override in parsed}


def of_cells(overrides: Sequence[str]) -> list[str]:
    """The overrides of a study that change the configuration of its cells, and none of the `SECTIONS`."""
    return [override for override in overrides if not override.lstrip("+~").startswith(SECTIONS)]


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
    """Set the value at a dotted key; whether there may be such a key is checked when the tree is parsed.

    Raises:
        ConfigError: a key on the way is no section, or the value would replace a whole section by some of its keys.
    """
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(tree.setdefault(section, {}), dict):
            raise ConfigError(f"{key}: {section} has no keys")
        tree = tree[section]
    if isinstance(value, Mapping) and isinstance(there := tree.get(name), Mapping) and there:
        raise ConfigError(f"{key} is a section: name its keys, such as {key}.{next(iter(value), next(iter(there)))}")
    tree[name] = value
