"""How a run was launched: by torchrun, accelerate or SLURM."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping

from fmnist.runtime.console import counted

logger = logging.getLogger("fmnist")
EXPECTED_WORLD_SIZE = "FMNIST_EXPECTED_WORLD_SIZE"
MIN_SHUTDOWN_TIMEOUT_S = 60
TRUE = ("1", "true", "yes", "y", "on", "t")  # as Accelerate reads a variable
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def check_world_size(world_size: int, environ: Mapping[str, str] = os.environ) -> None:
    """Compare the number of processes with the one that the batch script expects, where it does.

    Raises:
        ValueError: one line with both numbers.
    """
    expected = environ.get(EXPECTED_WORLD_SIZE, "")
    if expected and not (expected.isascii() and expected.isdigit() and int(expected) > 0):
        raise ValueError(f"{EXPECTED_WORLD_SIZE} is {expected!r}; valid range: 1 process or more")
    if expected and int(expected) != world_size:
        raise ValueError(
            f"started: {counted(world_size, 'process', 'processes')}, and {EXPECTED_WORLD_SIZE} is {expected}: "
            "the launcher did not start what the job asked for"
        )


def given_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs SLURM gave this job's step on this node."""
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdecimal() else 0


def check_gpus(found: int, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to train on the CPU in a SLURM job that was given GPUs, unless that is asked for.

    Args:
        found: accelerators that torch sees.
        environ: of this process.

    Raises:
        ValueError: one line.
    """
    given = given_gpus(environ)
    if given and not found and environ.get("ACCELERATE_USE_CPU", "").lower() not in TRUE:
        raise ValueError(
            f"torch sees no GPU, and this job has {given} on its node: install a torch that fits the driver "
            "(nvidia-smi names it), or train on the CPU with ACCELERATE_USE_CPU=true"
        )


def signal_warning(environ: Mapping[str, str] = os.environ) -> str | None:
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


def announce(environ: Mapping[str, str] = os.environ) -> None:
    """Log the SLURM job and what its signals would miss; call it once, on the main process."""
    if "SLURM_JOB_ID" in environ:
        nodes, restarts = environ.get("SLURM_JOB_NUM_NODES", "1"), environ.get("SLURM_RESTART_COUNT", "0")
        logger.info("SLURM job %s, nodes: %s, restart %s", environ["SLURM_JOB_ID"], nodes, restarts)
    if warning := signal_warning(environ):
        logger.warning("%s", warning)


def stop_with_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Get SIGTERM when the launcher dies, so that a killed one leaves no orphan but a checkpoint (Linux)."""
    launched = "TORCHELASTIC_RUN_ID" in environ or "ACCELERATE_MIXED_PRECISION" in environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
