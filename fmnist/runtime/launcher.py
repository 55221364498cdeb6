"""How a run was launched: by torchrun, accelerate or SLURM; and whether its processes can join."""

import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from fmnist.runtime.environment import ENVIRONMENT, integer, is_true

logger = logging.getLogger("fmnist")
EXPECTED_WORLD_SIZE = "FMNIST_EXPECTED_WORLD_SIZE"
MIN_SHUTDOWN_TIMEOUT_S = 60
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # found early: a forked child looks up little
# What asks Accelerate for another way to train than DDP.
OTHER_WAYS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
INTEGERS = {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}  # and their minimum
LAUNCHERS = {"torchrun", "torch.distributed.run", "accelerate", "accelerate-launch", "accelerate.commands.launch"}
# How many processes others than torchrun started; none of them tells them how to meet.
STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_processes() -> int:
    """Check what launchers set, before the processes meet, and return WORLD_SIZE.

    Raises:
        ValueError: one line: a variable that no process can use, or one that asks for another way to train.
    """
    for name in (f"ACCELERATE_USE_{way}" for way in OTHER_WAYS):
        if is_true(name):
            raise ValueError(f"{name} is true, but processes train with DDP here: unset it, or run accelerate config")
    if (world_size := integer("WORLD_SIZE", 1)) == 1:  # what else is left over has no effect, whatever it holds
        return 1
    rank, *_ = (integer(name, low) for name, low in INTEGERS.items())
    way_out = "unset WORLD_SIZE and RANK, or start the processes with torchrun"
    if rank >= world_size:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {world_size}; valid: 0 to {world_size - 1}: {way_out}")
    if not ENVIRONMENT.get("MASTER_ADDR"):
        raise ValueError(f"WORLD_SIZE is {world_size}, but MASTER_ADDR, where they meet, is not set: {way_out}")
    _check_interfaces()
    return world_size


def _check_interfaces() -> None:
    """Refuse an interface that is not there; NCCL's names are beginnings, after = whole names, after ^ exclusions."""
    present = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = ENVIRONMENT.get(variable, "")
        if not value or value.startswith("^"):
            continue
        whole = variable.startswith("GLOO") or value.startswith("=")
        for wanted in value.removeprefix("=").split(","):
            if not any(name == wanted if whole else name.startswith(wanted) for name in present):
                raise ValueError(f"{variable} is {value!r}: no such network interface; valid: {', '.join(present)}")


def check_world_size(world_size: int, environ: Mapping[str, str] = ENVIRONMENT) -> None:
    """Compare the number of processes that met with how many were started, and with what the batch script expects.

    Raises:
        ValueError: one line with both numbers.
    """
    if world_size == 1:
        name, started = _started(environ)
        if started > 1:
            raise ValueError(
                f"{started} processes were started ({name}={started}), but each runs alone: start them with "
                f"torchrun, as slurm/train.sbatch does; for {started} separate runs, unset {name} in each"
            )
        own = launcher_environment() or {}
        if own and "TORCHELASTIC_RUN_ID" not in environ and "MASTER_ADDR" in environ and "MASTER_ADDR" not in own:
            raise ValueError(
                "accelerate launch was asked for several processes but started one (its file's distributed_type): "
                "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N train.py starts N on the CPU"
            )
    if (expected := integer(EXPECTED_WORLD_SIZE, 1, environ)) != world_size and environ.get(EXPECTED_WORLD_SIZE):
        raise ValueError(
            f"started: {world_size} process{'' if world_size == 1 else 'es'}, and {EXPECTED_WORLD_SIZE} is {expected}: "
            "the launcher did not start what the job asked for"
        )


def check_alone(environ: Mapping[str, str] = ENVIRONMENT) -> None:
    """Refuse to be one of several processes, which would do the same work and write over each other's files.

    Raises:
        ValueError: one line with what says so.
    """
    name, started = _started(environ)
    if started > 1:
        raise ValueError(
            f"{name} is {started}, and this command runs in one process: start it once, without torchrun, srun or "
            f"mpirun; where the variable is left over, or to run it {started} times apart, unset {name}"
        )


def _started(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the variable that says that several processes were started, and their number; 1 where none does."""
    for name in ("WORLD_SIZE", *STARTED):
        if (number := environ.get(name, "")).isdecimal() and int(number) > 1:
            return name, int(number)
    return "", 1


def launcher_environment() -> dict[str, str] | None:
    """Return what torchrun or accelerate was itself started with; None where neither is this process' parent (Linux).

    It tells what the user has set from what the launcher has, and a launched process from one that inherited its
    variables.
    """
    parent = Path(f"/proc/{os.getppid()}")
    try:
        command, pairs = (parent / "cmdline").read_bytes(), (parent / "environ").read_bytes()
    except OSError:
        return None
    if not LAUNCHERS & {os.path.basename(word) for word in os.fsdecode(command).split("\0")[:6]}:
        return None
    return dict(pair.split("=", 1) for pair in os.fsdecode(pairs).split("\0") if "=" in pair)


def is_sibling() -> bool:
    """Say whether another process of the same launcher has the same command line, and reports what is wrong in it."""
    return ENVIRONMENT.get("LOCAL_RANK", "0") != "0" and launcher_environment() is not None


def given_gpus(environ: Mapping[str, str] = ENVIRONMENT) -> int:
    """Return how many GPUs SLURM gave this job's step on this node."""
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdecimal() else 0


def check_gpus(found: int, environ: Mapping[str, str] = ENVIRONMENT) -> None:
    """Refuse more processes than GPUs, and to train on the CPU in a SLURM job that was given some, unless asked to.

    Args:
        found: accelerators that torch sees.
        environ: of this process.

    Raises:
        ValueError: one line.
    """
    given = given_gpus(environ)
    if given and not found and not is_true("ACCELERATE_USE_CPU", environ):
        raise ValueError(
            f"torch sees no GPU, and this job has {given} on its node: install a torch that fits the driver "
            "(nvidia-smi names it), or train on the CPU with ACCELERATE_USE_CPU=true"
        )
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if found == 1 and visible and "," not in visible and "TORCHELASTIC_RUN_ID" not in environ:
        return  # srun --gpus-per-task=1 gives each process its own; torchrun's share one environment
    local = integer("LOCAL_RANK", 0, environ) if integer("WORLD_SIZE", 1, environ) > 1 else 0
    if found and local >= found and not is_true("ACCELERATE_USE_CPU", environ):
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: torch sees {found}; start one process for each GPU"
        )


def gpu_warning(processes: int, found: int, environ: Mapping[str, str] = ENVIRONMENT) -> str | None:
    """Say that several processes found no accelerator, unless the CPU was asked for; none where nothing is wrong.

    Args:
        processes: of this run.
        found: accelerators that torch sees.
        environ: of this process.
    """
    if processes == 1 or found or is_true("ACCELERATE_USE_CPU", environ):
        return None
    return f"no GPU found: {processes} processes compute on the CPU; set ACCELERATE_USE_CPU=true if that is intended"


def signal_warning(environ: Mapping[str, str] = ENVIRONMENT) -> str | None:
    """Say what keeps SLURM's signals from stopping this run with a checkpoint; none where nothing does.

    Args:
        environ: the environment of this process, as its launcher has left it.
    """
    if "SLURM_JOB_ID" not in environ:
        return None
    if "TORCHELASTIC_RUN_ID" not in environ:
        if "ACCELERATE_MIXED_PRECISION" not in environ:
            return None  # no launcher: the signals arrive here
        return "accelerate launch passes no signal on to a single process: start it as slurm/train.sbatch does"
    missing = []
    handled = {name.strip() for name in environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "").split(",")}
    if not {"SIGTERM", "SIGUSR1"} <= handled:
        missing.append("PET_SIGNALS_TO_HANDLE=SIGTERM,SIGUSR1 (else the time limit's warning ends the launcher)")
    timeout = environ.get("PET_SHUTDOWN_TIMEOUT") or environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or "30"
    if timeout.isdigit() and int(timeout) < MIN_SHUTDOWN_TIMEOUT_S:
        missing.append(f"PET_SHUTDOWN_TIMEOUT={MIN_SHUTDOWN_TIMEOUT_S} (else a save that takes {timeout} s is killed)")
    if not missing:
        return None
    return f"set in the job's environment, as slurm/train.sbatch does: {'; '.join(missing)}"


def announce() -> None:
    """Log the SLURM job and what its signals would miss; call it once, on the main process."""
    if "SLURM_JOB_ID" in ENVIRONMENT:
        nodes, restarts = ENVIRONMENT.get("SLURM_JOB_NUM_NODES", "1"), ENVIRONMENT.get("SLURM_RESTART_COUNT", "0")
        logger.info("SLURM job %s, nodes: %s, restart %s", ENVIRONMENT["SLURM_JOB_ID"], nodes, restarts)
    if warning := signal_warning(ENVIRONMENT):
        logger.warning("%s", warning)


def stop_with_launcher() -> None:
    """Do as `stop_with_parent` where a launcher is the parent."""
    if "TORCHELASTIC_RUN_ID" in ENVIRONMENT or "ACCELERATE_MIXED_PRECISION" in ENVIRONMENT:
        stop_with_parent()


def stop_with_parent() -> None:
    """Get SIGTERM when the parent dies, so that a killed one leaves no orphan but a checkpoint (Linux).

    As `preexec_fn` of a subprocess it holds for the program that is started.
    """
    if PRCTL is not None:
        PRCTL(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def without_effect(precision: str) -> list[str]:
    """Name what is set for Accelerate and would change the arithmetic, had it an effect.

    Args:
        precision: of this run, fp32 or bf16.
    """
    harmless = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("", "1", "auto"),
        "ACCELERATE_DYNAMO_BACKEND": ("", "no"),
        "ACCELERATE_MIXED_PRECISION": ("", "no", precision),
        "ACCELERATE_TORCH_DEVICE": ("",),
    }
    values = {name: ENVIRONMENT.get(name, "") for name in harmless}
    return [f"{name}={value}" for name, value in values.items() if value.lower() not in harmless[name]]
