"""Ctrl-C while a program imports its first modules: this one is imported, and called, before all others."""

import signal
import time

began: float | None = None  # when this program did, by time.monotonic; None in a notebook


def end_at_interrupt() -> None:
    """Let Ctrl-C end the process without Python's traceback, until `open_door` says it in a line.

    Where it is ignored, as in a shell's background jobs, it stays ignored.
    """
    global began
    began = began or time.monotonic()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
