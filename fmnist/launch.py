"""What a launcher must have done right: the number of processes, and signals that arrive.

`python -m fmnist.launch [flags of train.py]` prints the run directory that train.py would use, or its one-line error.
"""

import logging
import os

from fmnist.options import parse_config

logger = logging.getLogger("fmnist")
STOP_SIGNALS_BY_NAME = ("SIGTERM", "SIGUSR1")


def check_launch(world_size: int) -> None:
    """Compare the process count with the one a script promised, and look for signals that would never arrive.

    Args:
        world_size: processes that found each other.

    Raises:
        ValueError: $FMNIST_EXPECTED_WORLD_SIZE is set to another number.
    """
    expected = os.environ.get("FMNIST_EXPECTED_WORLD_SIZE", "")
    if expected and expected != str(world_size):
        raise ValueError(
            f"{world_size} process(es) found each other, but FMNIST_EXPECTED_WORLD_SIZE is {expected}: "
            "look at the launcher's options"
        )
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    handled = os.environ.get("PET_SIGNALS_TO_HANDLE", "").split(",")
    if "SLURM_JOB_ID" in os.environ and launched and not set(STOP_SIGNALS_BY_NAME) <= set(handled):
        logger.warning(
            "the launcher will not pass SLURM's signals on: set PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 and "
            "PET_SHUTDOWN_TIMEOUT=60, as slurm/train.sbatch does, or the time limit ends the job without a checkpoint"
        )


if __name__ == "__main__":
    print(parse_config(prog="train.py").output_dir)
