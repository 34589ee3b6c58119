"""What torchrun and srun say of the ranks that they start."""

import os

import pytest
import torch

from peerscale.train.distributed import joined_ranks, local_rank, started_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("variables", "rank_and_count"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (2, 4)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script, whose tasks srun would start
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, (0, 1)),
    ],
)
def test_what_started_the_ranks_is_known_from_the_environment(
    variables: dict[str, str], rank_and_count: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert started_ranks() == rank_and_count


def test_what_srun_says_is_what_torchrun_would(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "3",
    }  # fmt: skip
    joined = []
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda backend, timeout: joined.append(dict(os.environ))
    )
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they are put back
        monkeypatch.delenv(name)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with joined_ranks(CPU):
        assert (started_ranks(), local_rank()) == ((5, 8), 1)
    (environment,) = joined
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "2", "GROUP_WORLD_SIZE": "4"}
    assert told.items() <= environment.items()
    assert environment["MASTER_ADDR"] == "gpu07" and 15_000 <= int(environment["MASTER_PORT"]) < 25_000
