"""The environment that a cell ran in: to compare timings, and to know whether a resumed run is bit-exact."""

import ctypes
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from peerscale.config.schema import TrainerConfig
from peerscale.records.machine import cpu_name, git_commit

EXACT_KEYS = ("hardware", "device", "kernel", "compiled", "n_devices", "n_threads", "torch", "mkl")
"""A resumed run is bit-exact if these have not changed."""


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The `EXACT_KEYS` that differ between the environment of a record and the current one."""
    return [key for key in EXACT_KEYS if old.get(key) != new[key]]


def describe(kernel: str, device: torch.device, trainer: TrainerConfig) -> dict[str, Any]:
    """Hardware, versions, commit, kernel, devices, threads per device and MKL's kernels."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "device": device.type,
        "kernel": kernel,
        "compiled": trainer.compiles_on(device.type),
        "n_devices": trainer.devices,
        "n_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "peerscale": _own_version(),
        "git_commit": git_commit(),
        "mkl": mkl_kernels(),
    }


def mkl_kernels() -> str | None:
    """`avx512` if MKL was told to use it on any processor that has it (`ops/mkl_avx512.c`); None: as MKL decides."""
    return "avx512" if hasattr(ctypes.CDLL(None), "mkl_serv_intel_cpu_true") else None


def _own_version() -> str | None:
    """The version of this package; None if it is not installed but imported from the `src` of a checkout."""
    try:
        return version("peerscale")
    except PackageNotFoundError:
        return None
