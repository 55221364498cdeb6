"""The run directory: may it be used, is it finished, what made it."""

import json
import logging
import math
import platform
import shutil
import subprocess
from pathlib import Path

import accelerate
import timm
import torch

from fmnist.config import Config, differences
from fmnist.options import load_config

logger = logging.getLogger("fmnist")
# Everything a run writes into its directory; nothing else there is ever touched.
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "model.safetensors",
    "summary.json",
    "train.log",
    "learning_curves.png",
    "evaluation",
    "wandb",
    "wandb_run_id",
    "REQUEUE",
)


def open_directory(cfg: Config) -> Path:
    """Check that the run directory may be used, before anything is built or written.

    Raises:
        ValueError: it holds another run, or files that a run would overwrite.
    """
    directory = Path(cfg.output_dir or "runs/run")
    present = [name for name in RUN_FILES if (directory / name).exists()]
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir {directory} is a file")
    if cfg.resume == "never" and directory.is_dir() and any(directory.iterdir()) and not cfg.overwrite:
        raise ValueError(f"output_dir {directory} is not empty; add --overwrite true to delete the run in it")
    if cfg.resume == "auto" and present:
        if "config.yaml" not in present:
            raise ValueError(f"output_dir {directory} holds {present[0]} but no config.yaml: not a run to go on with")
        if changed := differences(load_config(directory / "config.yaml"), cfg):
            raise ValueError(
                f"{directory} holds a run with another config: {'; '.join(changed[:3])}. "
                "Give another --output_dir, or --resume never --overwrite true"
            )
    return directory


def is_finished(directory: Path) -> bool:
    """Say whether the run in this directory has reached its end, and tell people so."""
    try:
        summary = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError):
        return False
    if summary.get("status") != "finished":
        return False
    logger.info("%s is finished: test top1 %.2f %%", directory, 100 * summary.get("test.top1", math.nan))
    return True


def clear_directory(directory: Path) -> None:
    """Delete a run's files, and nothing else."""
    for name in RUN_FILES:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }


def git_revision() -> str:
    """Return the commit of the code, with -dirty where it was changed, or unknown."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
