"""A real Slurm of one node on loopback, its daemons with their own key and ports, and a study for it to train."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peerscale.config.schema import load
from peerscale.data.prepare import prepare
from peerscale.plan.cells import planned_cells
from peerscale.plan.cost import cost

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun", "scontrol", "scancel")

CONFIGURATION = """\
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits cred_expire seconds, 120 if not said otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
KillWait={kill_wait_s}
MinJobAge=300
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""

STUDY = """\
defaults: [override data: text, override tracking: disabled]
sweep:
  methods: [dense, peer]
  grid: [{{budget: {short}, d_model: [8]}}, {{budget: {long}, d_model: [8]}}]
  min_sizes: 1
data: {{path: {text}, directory: {folder}/data, vocab_size: 300, max_epochs: 1e6, evaluation: {{validation: 512}}}}
trainer: {{runs_directory: {folder}/runs, kernel: torch, log_every_steps: 20, checkpoint_every_steps: 50}}
size: {{n_layers: 2}}
context: 8
min_steps: 40
"""


def trainable_study(folder: Path, steps: int) -> Path:
    """A study's file: dense at 50 and at `steps` steps, PEER at a dropped cell and at fewer steps; corpus prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    text, file = folder / "text.txt", folder / "toy.yaml"
    text.write_text("\n".join(f"{i * i} {i % 97} {i % 89}" for i in range(20_000)))
    config = load(["d_model=8", "n_layers=2", "context=8", "data=text", f"data.path={text}", "data.vocab_size=300"])
    step = cost(config).flops_per_token * config.tokens_per_step
    file.write_text(STUDY.format(short=f"{50 * step:.6e}", long=f"{steps * step:.6e}", text=text, folder=folder))
    prepare(planned_cells(file)[0].config.data)
    return file


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    return f"no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)" if absent else ""


@contextlib.contextmanager
def one_node_slurm(folder: Path, *, kill_wait_s: int = 5) -> Iterator[None]:
    """Set SLURM_CONF to a running cluster; stop its jobs and daemons at the end."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder,
            user=getpass.getuser(),
            cpus=os.cpu_count(),
            memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4 // 2**20,
            controller_port=ports[0],
            node_port=ports[1],
            kill_wait_s=kill_wait_s,
        )
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    kept = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ |= {"SLURM_CONF": str(configuration), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    # In the foreground, so that they are ours to stop; --force lets munged live in a folder that others may read.
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
        ["slurmctld", "-D", "-f", str(configuration)],
        ["slurmd", "-D", "-f", str(configuration), "-N", "localhost"],
    ]  # fmt: skip
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True))
            time.sleep(0.2)
        _wait_for_node(folder)
        yield
    finally:
        subprocess.run(["scancel", "--signal=KILL", f"--user={getpass.getuser()}"], timeout=20, check=False)
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], timeout=20, check=False)
        for _ in range(20):
            if not ask("squeue", "--noheader"):
                break
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def ask(*command: str) -> str:
    """What a command of Slurm's prints, or nothing if it fails."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _wait_for_node(folder: Path) -> None:
    for _ in range(50):
        if ask("sinfo", "--noheader", "--format=%T") == "idle":
            return
        time.sleep(0.2)
    logs = "\n".join(f"{log.name}: {log.read_text()[-800:]}" for log in sorted(folder.glob("*.log")))
    pytest.fail(f"Slurm does not start here:\n{logs}")
