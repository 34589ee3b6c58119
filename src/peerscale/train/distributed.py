"""One cell on several devices: one process (rank) per device, connected by torch's collectives.

torchrun or srun starts the ranks on one or several machines; otherwise `launch` starts them on this machine. All ranks
train and evaluate; only the first one writes files.
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
"""The longest time that a rank waits for another one, which may compile or write a checkpoint to a slow disk."""

GRACE_S = 3.0
"""When a rank ends, the connections of the others break and they fail; they wait this long, so that it ends first."""

PROGRAM = ("-m", "peerscale.train.rank")
"""Arguments of Python for the ranks that `launch` starts; the path of the job's file follows."""


class RankError(Exception):
    """A rank failed or was killed; its traceback follows the first line."""


def started_ranks() -> tuple[int, int]:
    """The rank of this process and the number of ranks that torchrun or srun started; 0 and 1 if neither did."""
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if int(os.environ.get(count, 1)) > 1:
            return int(os.environ[rank]), int(os.environ[count])
    return 0, 1


@contextlib.contextmanager
def joined_ranks(device: "torch.device") -> Iterator[None]:
    """A context in which this process is connected to the other started ranks; does nothing for a single rank."""
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
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # a collective failed because another rank ended
            time.sleep(GRACE_S)
        raise
    finally:
        dist.destroy_process_group()


def _name_as_torchrun() -> None:
    """Copy srun's environment variables to torchrun's names, which torch and Lightning read."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    rank, count = started_ranks()
    # Steps of a job run at the same time and jobs may share a machine, so each needs its own port.
    port = 15_000 + (int(os.environ["SLURM_JOB_ID"]) + 10 * int(os.environ["SLURM_STEP_ID"])) % 10_000
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"], "GROUP_WORLD_SIZE": os.environ["SLURM_STEP_NUM_NODES"],
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port),
    }  # fmt: skip


def local_rank() -> int:
    """The rank's number on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def trainer_settings() -> dict[str, Any]:
    """Arguments of Lightning's Trainer that describe the ranks."""
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    n_nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    # All ranks compute the same buffers; `TableExchange` replaces DDP for the tables.
    strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    devices = started_ranks()[1] // n_nodes
    return {"devices": devices, "num_nodes": n_nodes, "strategy": strategy, "plugins": [TorchElasticEnvironment()]}


def launch(n_ranks: int, cell: Any) -> None:
    """Run `PROGRAM` in `n_ranks` processes on this machine until all have ended; its argument is a file with the
    pickled `cell`.

    A signal that ends this process is passed on to the ranks, which have half a minute to save a checkpoint.

    Raises:
        UserError: the cell cannot be run as it is.
        RankError: a rank failed or was killed; the others are ended.
        KeyboardInterrupt: a signal ended the ranks.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its warnings repeat what we report
    replaced = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # torch's launcher replaces these
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
            if failure.exitcode != FAILED_CELLS:  # the exit code of the first rank if it has recorded the reason
                raise _reason(rank, failure) from None
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)


def _reason(rank: int, failure: "ProcessFailure") -> BaseException:
    """The exception to raise for the rank that ended first."""
    if failure.exitcode == INTERRUPTED:
        return KeyboardInterrupt()
    if isinstance(failure.message, dict):  # an exception, written by the decorator `record`
        message = failure.message["message"]
        if message.startswith("UserError: "):
            return UserError(message.removeprefix("UserError: "))
        return RankError(f"rank {rank}: {message}\n{failure.message['extraInfo']['py_callstack']}")
    ending = f"ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exit {failure.exitcode}"
    return RankError(f"rank {rank}: {ending}")
