"""One piece of work at a time beside the main thread, such as a checkpoint that is being written."""

import threading
import time
from collections.abc import Callable
from typing import Any

THREAD_NAME = "fmnist background"


class Background:
    """Do one thing at a time in a thread; the interpreter does not end before it is done.

    Args:
        failed: is called, in the thread, where the work raises.
    """

    def __init__(self, failed: Callable[[], object] = lambda: None) -> None:
        self._failed = failed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, action: Callable[..., object], *args: Any) -> None:
        """Begin with an action; the one before is over, see `wait`."""

        def work() -> None:
            try:
                action(*args)
            except BaseException as error:  # for the main thread, whatever it is
                self._error = error
                self._failed()

        self._thread = threading.Thread(target=work, name=THREAD_NAME)
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing is under way, whether it failed or not."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Wait until nothing is under way.

        Raises:
            BaseException: what the work raised, once.
        """
        self.join()
        if (error := self._error) is not None:
            self._error = None
            raise error


def join_all(timeout_s: float) -> None:
    """Wait for all that is under way in this process, for so long at most."""
    deadline = time.monotonic() + timeout_s
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join(max(0.0, deadline - time.monotonic()))
