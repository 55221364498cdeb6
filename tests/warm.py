"""Whole programs by the dozen: each is a process of its own, forked from one that has imported all of them already.

A start costs a tenth of a second instead of five; several processes meet without torchrun. What needs the first import,
a launcher or the environment at a start is tested through `train` of `conftest.py` and the like.
"""

import atexit
import contextlib
import functools
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forks import ROOT, run_all

TIME_LIMIT_S = 300


@functools.cache
def _server() -> "subprocess.Popen[str]":
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=env)
    assert server.stdin is not None
    atexit.register(server.stdin.close)
    return server


def run_program(
    *argv: object, env: Mapping[str, str], processes: int = 1, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a program of this project as `python ARGV` would, on so many processes.

    Args:
        argv: a script of the root, or -m and a module, and their arguments.
        env: of the processes; what a library reads of it at its import is without effect.
        processes: how many; where one fails, the others are killed.
        cwd: this process's where not given.
    """
    server, words = _server(), [str(word) for word in argv]
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        job = {"argv": words, "env": dict(env), "processes": processes, "cwd": str(cwd or Path.cwd()), "folder": folder}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(words, next(filter(None, statuses), 0), out, err)


def serve() -> None:
    """Answer jobs until stdin ends."""
    import numpy  # noqa: F401
    import torch

    import evaluate  # noqa: F401
    import fmnist.report.write  # noqa: F401
    import train  # noqa: F401

    torch.set_num_threads(1)
    sys.path.remove(str(Path(__file__).parent))
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(run_all(job["processes"], functools.partial(work, job), TIME_LIMIT_S)), flush=True)
    os._exit(0)  # nothing to tidy up, and an interpreter with torch in it takes seconds to do so


def work(job: dict[str, Any], launched: dict[str, str]) -> int:
    """Run the program in this fork, and return its exit status."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(job["folder"], name), os.O_CREAT | os.O_APPEND | os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(job["env"] | launched)
    os.chdir(job["cwd"])
    random.seed()  # what a start does not set itself is different in every start
    sys.modules["numpy"].random.seed()
    script, *_ = job["argv"]
    sys.argv = job["argv"][script == "-m" :]
    status = 0
    try:
        if script == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return status


if __name__ == "__main__":
    serve()
