"""One cell on several devices: a process for each, its rank; torch's collectives join them.

torchrun or srun starts the ranks, on one machine or several, or else `launch` does, on this machine. All ranks train
and evaluate; only the first one writes.
"""

import contextlib
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerscale.errors import FAILED_CELLS, INTERRUPTED, UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

TIMEOUT = timedelta(minutes=10)
"""Longest that a rank waits for another, such as one that compiles or writes a checkpoint to a slow disk."""

GRACE_S = 3.0
"""When one rank ends, the others fail because their connections break; they wait this long, so that it ends first."""

PROGRAM = ("-m", "peerscale.training.rank")
"""What Python runs as each rank that `launch` starts, with the path of the job's file as its argument."""


class RankError(Exception):
    """A rank failed, or was killed; its traceback follows the first line."""


def started_ranks() -> tuple[int, int]:
    """This process's rank, and how many torchrun or srun started; 0 and 1 if neither did."""
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if int(os.environ.get(count, 1)) > 1:
            return int(os.environ[rank]), int(os.environ[count])
    return 0, 1


@contextlib.contextmanager
def joined_ranks(device: "torch.device") -> Iterator[None]:
    """Be one of the started ranks while entered, or, if there is one only, do nothing."""
    import torch.distributed as dist

    if started_ranks()[1] == 1:
        yield
        return
    _name_as_torchrun()
    backend = "gloo"
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # a collective failed, since another rank ended
            time.sleep(GRACE_S)
        raise
    finally:
        dist.destroy_process_group()


def _name_as_torchrun() -> None:
    """Give srun's variables the names that torchrun's have, which torch and Lightning read."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    rank, count = started_ranks()
    # Steps of a job run side by side, and jobs may share a machine, so each needs a port of its own.
    port = 15_000 + (int(os.environ["SLURM_JOB_ID"]) + 10 * int(os.environ["SLURM_STEP_ID"])) % 10_000
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"], "GROUP_WORLD_SIZE": os.environ["SLURM_STEP_NUM_NODES"],
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port),
    }  # fmt: skip


def local_rank() -> int:
    """This rank's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def trainer_settings() -> dict[str, Any]:
    """What Lightning's Trainer must know of the ranks that this process has joined."""
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    n_nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    # All ranks compute the same buffers, and `TableExchange` takes the place of DDP for the tables.
    strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    devices = started_ranks()[1] // n_nodes
    return {"devices": devices, "num_nodes": n_nodes, "strategy": strategy, "plugins": [TorchElasticEnvironment()]}


def launch(n_ranks: int, cell: Any) -> None:
    """Run `PROGRAM` as each of `n_ranks` ranks on this machine until all have ended; its argument is a file with the
    pickled `cell`.

    A signal that asks this process to end goes on to the ranks, which have half a minute for a checkpoint.

    Raises:
        UserError: a rank was given what cannot be run.
        RankError: a rank failed, or was killed; the others are ended.
        KeyboardInterrupt: a signal ended them.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its warnings repeat what we report
    replaced = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torch's launcher
    handlers = [(number, signal.getsignal(number)) for number in replaced]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cell.pickle")
        path.write_bytes(pickle.dumps(cell))
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=n_ranks, max_restarts=0, run_id="cell", local_addr="localhost",
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", logs_specs=DefaultLogsSpecs(log_dir=folder),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)(*PROGRAM, str(path))
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode != FAILED_CELLS:  # with which the first rank ends once it has recorded why
                raise _reason(rank, failure) from None
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)


def _reason(rank: int, failure: "ProcessFailure") -> BaseException:
    """What to raise for the rank that ended first."""
    if failure.exitcode == INTERRUPTED:
        return KeyboardInterrupt()
    if isinstance(failure.message, dict):  # an exception, which `record` wrote down
        message = failure.message["message"]
        if message.startswith("UserError: "):
            return UserError(message.removeprefix("UserError: "))
        return RankError(f"rank {rank}: {message}\n{failure.message['extraInfo']['py_callstack']}")
    ending = f"ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exit {failure.exitcode}"
    return RankError(f"rank {rank}: {ending}")
