"""YAML files and overrides -> one nested mapping, by Hydra, whose parts are imported when first needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peerscale.config_errors import ConfigError, first_line, method_in
from peerscale.files import ROOT

STUDY = ".study"
"""Ends the names by which Hydra knows studies, so that it does not read the file of a study by itself."""

REGISTERED: dict[str, tuple[Path, int, int]] = {}
"""The file, its time and its size that each name of a study stands for in Hydra's store."""


def sweep_file(sweep: str | Path) -> Path:
    """The file of a study given by name or path; raises `ConfigError` with the studies there are."""
    path = Path(sweep)
    path = path if path.suffix in (".yaml", ".yml") else ROOT / "sweeps" / f"{sweep}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml")))
        raise ConfigError(f"no sweep file {path.name}; in sweeps/ there are: {known or 'none'}")
    return path.resolve()


def read_study(file: Path) -> dict[str, Any]:
    """What stands in a study's file, before Hydra lays it over anything; raises `ConfigError` if it is no mapping."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        study = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OmegaConfBaseException, YAMLError) as error:
        raise config_error(error) from None
    if not isinstance(study, dict):
        raise ConfigError(f"{file.name}: input should be a mapping with a `sweep:` section, not a list")
    return {str(key): value for key, value in study.items()}


def register_study(sweep: str | Path) -> str:
    """Make a study known to Hydra, and return the name under which Hydra composes it.

    The file needs no lines for Hydra: its settings are laid over `conf/config.yaml`, unless its `defaults` name another
    file to lay them over, and Hydra always runs it as a multirun.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    file = sweep_file(sweep)
    name, version = f"{file.stem}{STUDY}", (file, file.stat().st_mtime_ns, file.stat().st_size)
    if REGISTERED.get(name) == version:  # a plan composes a study once for each layer, size and value of an axis
        return name
    study = read_study(file)
    hydra, defaults = study.get("hydra") or {}, study.get("defaults") or []
    for key, value, kind, wanted in (("hydra", hydra, dict, "mapping"), ("defaults", defaults, list, "list")):
        if not isinstance(value, kind):
            raise ConfigError(f"{file.name}: {key}: input should be a {wanted}, not {value!r}")
    bases = [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    node = {
        **study,
        "defaults": [*([] if bases else ["config"]), *defaults, *([] if "_self_" in defaults else ["_self_"])],
        # Files that its `defaults` name may lie beside it; without any, nothing is looked for there.
        "hydra": {**hydra, "mode": "MULTIRUN", "searchpath": [f"file://{file.parent}"] if defaults else []},
    }
    ConfigStore.instance().store(name, OmegaConf.create(node), provider=str(file))
    REGISTERED[name] = version
    return name


def registered_file(config_name: str) -> Path | None:
    """The file of the study that Hydra knows as `config_name`; None if that is no study."""
    from hydra.core.config_store import ConfigStore

    if not config_name.endswith(STUDY):
        return None
    return Path(str(ConfigStore.instance().load(f"{config_name}.yaml").provider))


def check_hydra(sweep: Path) -> None:
    """Refuse a study whose `hydra` section names what Hydra would call: a study is data, and runs no code of its own.

    Raises:
        ConfigError: the section sets callbacks, logging, environment variables, or a launcher or sweeper of its own.
    """
    if not {"hydra", "defaults"} & read_study(sweep).keys():
        return  # nothing of it reaches Hydra's own section
    ours, its = compose(hydra=True), compose(sweep=sweep, hydra=True)
    for key in ("callbacks", "job_logging", "hydra_logging"):
        if its.get(key) != ours.get(key):
            raise ConfigError(f"{sweep.name}: hydra.{key} is not for a study to set, since it could run code")
    if its["job"].get("env_set"):
        raise ConfigError(f"{sweep.name}: hydra.job.env_set is not for a study to set, since it could run code")
    for key in ("launcher", "sweeper"):
        target = its.get(key, {}).get("_target_", "")
        if not target.startswith(("hydra_plugins.", "hydra._internal.core_plugins.")):
            raise ConfigError(
                f"{sweep.name}: hydra.{key} {target!r} is not a plugin; choose one: override hydra/{key}: NAME"
            )


def compose(overrides: Sequence[str] = (), *, sweep: str | Path | None = None, hydra: bool = False) -> dict[str, Any]:
    """The composed configuration as plain nested values, before it is checked against the dataclasses.

    With `hydra` it is Hydra's own section in place of ours, unresolved.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.initialize import get_gh_backup, restore_gh_from_backup
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    name = "config" if sweep is None else register_study(sweep)
    running = get_gh_backup()  # a sweep composes its cells inside a running Hydra, which allows only one at a time
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = hydra_compose(name, overrides=list(overrides), return_hydra_config=hydra)
        tree = OmegaConf.to_container(
            composed.hydra if hydra else composed, resolve=not hydra, throw_on_missing=not hydra
        )
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # ValueError: size=null and such
        raise config_error(error, overrides, sweep=sweep) from None
    finally:
        restore_gh_from_backup(running)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def config_error(error: Exception, overrides: Sequence[str] = (), *, sweep: str | Path | None = None) -> ConfigError:
    """An error of Hydra, OmegaConf or YAML that `overrides` met, as ours."""
    from peerscale.config import Config  # which imports this module

    def layer() -> str | None:
        try:
            return method_in(compose([o for o in overrides if not o.startswith("ffn.")], sweep=sweep))
        except ConfigError:
            return None

    return ConfigError(first_line(error, Config, layer).replace(f"{STUDY}'", "'"))
