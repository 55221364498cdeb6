"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, all under one folder."""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, environment
from forks import free_socket

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun", "salloc")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=20
MinJobAge=600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    """Name the programs of SLURM and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(free_socket()) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.env = environment() | {
            "SLURM_CONF": str(self.config),
            "PATH": search_path(),
            "FMNIST_VENV": sys.prefix,
            "FMNIST_PROCESSES_PER_NODE": "1",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        text = CONFIG.format(folder=self.folder, host=socket.gethostname(), ports=free_ports(3))
        self.config.write_text(text)
        for number in range(2):  # GPUs that SLURM counts; there is no device behind them
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.spawn("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge)
        self.wait_until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.spawn("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            self.spawn("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.call("sinfo", "-h", "-o", "%T", "-t", "idle").split() == ["idle"], "the nodes")

    def spawn(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.{len(self.daemons)}.out").open("wb")
        self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True))

    def stop(self) -> None:
        self.call("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()

    def wait_until(self, met: object, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not met():  # type: ignore[operator]
            logs = "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in self.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{logs}"
            time.sleep(0.2)

    def call(self, *command: object) -> str:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=self.env, cwd=ROOT)
        return done.stdout + done.stderr

    def submit(self, *command: object, folder: Path = ROOT, **env: str) -> int:
        """Submit a script from a folder, the repository's root by default, with its log in the cluster's folder."""
        line = ["sbatch", "--parsable", f"--output={self.folder}/%A_%a.out", *map(str, command)]
        done = subprocess.run(line, capture_output=True, text=True, env=self.env | env, cwd=folder)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def log(self, job: int) -> str:
        """Return what all tasks of a job have printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"{job}_*.out")))

    def job(self, job: int) -> dict[str, str]:
        """Return SLURM's record of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", job).splitlines()[0]))

    def wait_for(self, job: int, seconds: float = 240) -> dict[str, str]:
        """Wait for a job, through all its restarts, and return its record."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
        self.wait_until(lambda: self.job(job).get("JobState") in over, f"job {job}: {self.log(job)[-2000:]}", seconds)
        return self.job(job)
