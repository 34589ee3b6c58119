"""One cell on several devices of a machine: a process for each, its rank, joined by Lightning's DDP.

The process that runs the cell is the first rank, and the only one that writes. It starts the others and sends each its
job on standard input. They end when it ends, for whatever reason, because that closes the pipe.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from peerscale.config import Config
from peerscale.kernels.gradients import Pairs, TableGradient, collect_row_gradients, collected_gradients
from peerscale.layers.modules.product_keys import ProductKeyRetrieval
from peerscale.model.ranks import gather, gather_on_first, mean_over_ranks, n_ranks, share
from peerscale.model.sharded_tables import keep_own_rows
from peerscale.plan import Plan
from peerscale.training.module import LanguageModel

TIMEOUT = timedelta(minutes=10)
"""Longest that a rank waits for another, such as one that compiles or writes a checkpoint to a slow disk."""

GRACE_S = 3.0
"""A failing rank breaks its connections before it ends; the first rank waits this long to see which one ended."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal or Slurm sends these to all processes of a job; only the first rank acts on them."""

PROGRAM = "from peerscale.training.distributed import further_rank; further_rank()"


class RankError(Exception):
    """Another rank failed; its traceback follows the first line."""


@contextlib.contextmanager
def ranks(n_devices: int, device: torch.device, job: Mapping[str, Any]) -> Iterator[None]:
    """Start the further ranks with `job`, which holds what `further_rank` reads; be the first rank while entered.

    Raises:
        RankError: one of them failed, or was killed.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        job = {**job, "rendezvous_file": str(Path(folder, "rendezvous"))}
        others = [running.enter_context(_process({**job, "rank": rank})) for rank in range(1, n_devices)]
        for rank, process in enumerate(others, start=1):
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise _rank_error(rank, process)
        with _group(device, 0, n_devices, job["rendezvous_file"]):
            try:
                yield
            except RuntimeError as error:  # perhaps of a broken connection
                limit = time.monotonic() + GRACE_S
                while time.monotonic() < limit:
                    for rank, process in enumerate(others, start=1):
                        if process.poll():
                            raise _rank_error(rank, process) from error
                    time.sleep(0.05)
                raise


@contextlib.contextmanager
def _process(job: Mapping[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """A further rank; killed on leaving, which loses nothing since it writes nothing."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which a new process inherits
    try:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert process.stdin is not None
    with process:
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which `ranks` notices next
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
            yield process
        finally:
            process.kill()


def _rank_error(rank: int, process: subprocess.Popen[bytes]) -> RankError:
    assert process.stdout is not None
    output, code = process.stdout.read().decode(errors="replace").strip(), process.wait()
    ending = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    return RankError(f"rank {rank}: {output.splitlines()[-1] if output else ending}\n{output}")


@contextlib.contextmanager
def _group(device: torch.device, rank: int, size: int, rendezvous_file: str) -> Iterator[None]:
    """Be one of `size` ranks that find each other through a file."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous_file}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def further_rank() -> None:
    """The program of every rank but the first: fit and evaluate the job that standard input holds, in one line."""
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_first_rank, daemon=True).start()
    stdout, sys.stdout = sys.stdout, sys.stderr  # the first rank reads it

    from peerscale.config import parse_config
    from peerscale.data.store import open_corpus
    from peerscale.plan import plan
    from peerscale.training.cell import build_module, fit, pick_device, prepare_process
    from peerscale.training.checkpoint import TimedCheckpoint
    from peerscale.training.evaluation import evaluate
    from peerscale.training.metrics import Diverged

    try:
        config, rank = parse_config(job["config"]), job["rank"]
        corpus = open_corpus(config.data)
        prepare_process(config)
        device = pick_device(config, rank)
        print("ready", file=stdout, flush=True)
        with _group(device, rank, config.trainer.devices, job["rendezvous_file"]):
            saving = TimedCheckpoint(Path(job["checkpoints"]), config.trainer.checkpoint_every_s)
            resumed = Path(job["resumed"]) if job["resumed"] else None
            module = build_module(config, plan(config, set_tokens=corpus.manifest.splits))
            fit(module, corpus, None, saving, resumed)
            evaluate(module, corpus, config, device)
    except Diverged:
        pass  # the first rank finds that at the same step
    except BaseException:
        print(traceback.format_exc(), file=stdout, flush=True)
        os._exit(1)  # without waiting for threads of a broken group


def _end_with_first_rank() -> None:
    sys.stdin.buffer.read()  # until the pipe is closed, which happens at the latest when the first rank dies
    os._exit(1)


class _Environment(LightningEnvironment):
    """Ranks that run already, so Lightning starts none."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return dist.get_rank()


def settings(n_devices: int) -> dict[str, Any]:
    """What Lightning's Trainer must know of the ranks."""
    # All ranks compute the same buffers, and `TableExchange` takes the place of DDP for the tables.
    strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return {"devices": n_devices, "strategy": strategy, "plugins": [_Environment()]}


class ShardedLanguageModel(LanguageModel):
    """A model whose expert tables hold this rank's share of the rows; its checkpoints hold whole tables."""

    def __init__(self, config: Config, plan: Plan) -> None:
        super().__init__(config, plan)
        for layer in self.modules():
            if isinstance(layer, ProductKeyRetrieval):
                layer.sharded = True
        for table in self.groups.tables:
            keep_own_rows(table)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._change_tables(checkpoint, gather_on_first)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._change_tables(checkpoint, lambda whole: whole[share(len(whole))].clone())

    def _change_tables(self, checkpoint: dict[str, Any], change: Callable[[Tensor], Tensor]) -> None:
        ids = {id(table) for table in self.groups.tables}
        for name, parameter in self.named_parameters():
            if id(parameter) in ids:
                checkpoint["state_dict"][name] = change(checkpoint["state_dict"][name])
        (optimizer,) = checkpoint["optimizer_states"]
        for i in optimizer["param_groups"][-1]["params"] if ids else []:  # the tables' group
            state = optimizer["state"][i]
            optimizer["state"][i] = {key: change(value) if value.ndim else value for key, value in state.items()}


class TableExchange(lightning.Callback):
    """Averages the gradients of the expert tables, in place of DDP.

    The ranks exchange the factors of a gradient, which are as large as the batch, instead of the gradient, which is as
    large as the table; only the `reference` kernel, which has no factors, exchanges gradients. Sharded tables hold the
    sum over all ranks already.
    """

    def __init__(self, module: LanguageModel) -> None:
        self.tables, self.row_sparse = module.groups.tables, module.config.optim.name == "row_sparse_adamw"
        self.sharded = module.config.trainer.shard_tables
        ids = {id(table) for table in self.tables}
        names = [name for name, parameter in module.named_parameters() if id(parameter) in ids]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
        for table in self.tables:
            collect_row_gradients(table)

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        together = (lambda x: x) if self.sharded else gather
        shared: dict[int, Pairs] = {}  # a layer's tables have the same rows
        for table in self.tables:
            if table.grad is not None:
                table.grad = table.grad / n_ranks() if self.sharded else mean_over_ranks(table.grad)
            collected = collected_gradients(table)
            assert collected is not None
            if (here := collected.total()) is None:
                continue
            backend, n_rows = here.pairs.backend, here.pairs.n_rows
            if id(here.pairs) not in shared:
                shared[id(here.pairs)] = Pairs(backend, together(here.pairs.rows_TJ), n_rows)
            pairs = shared[id(here.pairs)]
            gradient = TableGradient(pairs, together(here.coefficients_TJ) / n_ranks(), together(here.vectors_TD))
            collected.clear()
            if self.row_sparse:
                collected.gradients.append(gradient)
            else:
                table.grad = backend.table_gradient(gradient, n_rows)
