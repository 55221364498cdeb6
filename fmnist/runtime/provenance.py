"""What made a result: versions, the commit, the processor."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import torch  # late, for its build too (+cu130): its metadata have the number alone

    libraries = {name: metadata.version(name) for name in ("timm", "accelerate")}
    return {"python": platform.python_version(), "torch": torch.__version__, **libraries}


def git_revision() -> str:
    """Return the commit of the code, with -dirty where it was changed, or unknown."""
    here = Path(__file__)

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed inside another repository, its commit is not ours
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def processor() -> str:
    """Return the CPU's name, e.g. as /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def measured_now(**hardware: Any) -> dict[str, Any]:
    """Return what a measurement depends on, for its JSON: the date, the hardware, the versions and the commit."""
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": {"processor": processor(), "cpu_cores": os.cpu_count()} | hardware,
        "versions": versions(),
        "git_revision": git_revision(),
    }
