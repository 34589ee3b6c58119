"""YAML files and overrides -> one nested mapping, by Hydra, whose parts are imported when first needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peerscale.config_errors import ConfigError, first_line
from peerscale.files import ROOT


def sweep_file(sweep: str | Path) -> Path:
    """The file of a study given by name or path; raises `ConfigError` with the studies there are."""
    path = Path(sweep)
    path = path if path.suffix in (".yaml", ".yml") else ROOT / "sweeps" / f"{sweep}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml")))
        raise ConfigError(f"no sweep file {path.name}; in sweeps/ there are: {known or 'none'}")
    return path.resolve()


def check_hydra(sweep: Path) -> None:
    """Refuse a study whose `hydra` section names what Hydra would call: a study is data, and runs no code of its own.

    Raises:
        ConfigError: the section sets callbacks, logging, environment variables, or a launcher or sweeper of its own.
    """
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
                f"{sweep.name}: hydra.{key} {target!r} is no plugin; choose one: override hydra/{key}: NAME"
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

    conf = ROOT / "conf"
    file = sweep_file(sweep) if sweep is not None else conf / "config.yaml"
    search = [f"hydra.searchpath=[file://{conf}]"] if sweep is not None else []
    running = get_gh_backup()  # a sweep composes its cells inside a running Hydra, which allows but one at a time
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3"):
            composed = hydra_compose(file.stem, overrides=[*search, *overrides], return_hydra_config=hydra)
        tree = OmegaConf.to_container(
            composed.hydra if hydra else composed, resolve=not hydra, throw_on_missing=not hydra
        )
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # ValueError: size=null and such
        from peerscale.config import Config  # which imports this module

        raise ConfigError(first_line(error, Config)) from None
    finally:
        restore_gh_from_backup(running)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
