"""A trainer that the queue started: its lock, its end, and what it took."""

import datetime
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.queue_entries import Entry
from experiments.queue_results import USAGE, curve
from fmnist.runtime.files import read_json
from fmnist.runtime.launcher import stop_with_parent

ROOT = Path(__file__).resolve().parent.parent


def take_lock(directory: Path) -> int | None:
    """Take the right to train in a directory, as an open file; None where another queue, or its trainer, has it."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / "queue.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


class Job:
    """A trainer that is running, and its end in usage.jsonl.

    It goes on from its own newest checkpoint. It gets SIGTERM when this process dies, and saves one. It holds the lock
    that was taken for it, as this process does until `release`: no queue starts another in its directory before it has
    ended and, where this process lives on, its result is written.
    """

    def __init__(self, entry: Entry, seed: int, directory: Path, lock: int, threads: int | None) -> None:
        self.entry, self.seed, self.directory, self.lock, self.lagging = entry, seed, directory, lock, False
        self.validations = len(curve(directory))  # of earlier starts
        command = [sys.executable, "train.py", *entry.arguments(seed, directory)]
        command += ["--threads", str(threads)] if threads else []
        self._note({"event": "start", "date": datetime.datetime.now().isoformat(timespec="seconds")})
        self.began = time.monotonic()
        self.process = subprocess.Popen(command, cwd=ROOT, preexec_fn=stop_with_parent, pass_fds=[lock])

    def ended(self, wait: bool = False) -> bool:
        """Say whether the trainer has ended, and note once what it took."""
        if self.process.returncode is not None:
            return True
        pid, status, used = os.wait4(self.process.pid, 0 if wait else os.WNOHANG)
        if pid == 0:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self._note({"event": "end", "wall": time.monotonic() - self.began, "cpu": used.ru_utime + used.ru_stime})
        return True

    def stop(self) -> None:
        """Ask the trainer to save and end."""
        if not self.ended():
            self.process.terminate()

    def status(self) -> str:
        """Return what the trainer's summary says, once it has ended: finished or stopped; failed where it has none."""
        if self.process.returncode != 0 or not (self.directory / "summary.json").is_file():
            return "failed"
        return str(read_json(self.directory / "summary.json").get("status"))

    def release(self) -> None:
        """Let other queues look at the directory."""
        os.close(self.lock)

    def _note(self, line: dict[str, Any]) -> None:
        with (self.directory / USAGE).open("a") as file:
            file.write(json.dumps(line) + "\n")
