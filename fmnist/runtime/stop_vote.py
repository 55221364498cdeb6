"""When to stop: what signals and the time limit ask of one process, agreed on by all of them."""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmnist.runtime.heartbeat import PATIENCE, Heartbeat

logger = logging.getLogger("fmnist")
# Those that this system has; SIGHUP comes from a closed terminal.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name)]
# Between two votes of several processes, where all of them make their steps within STEP_S; else each step has one.
VOTE_STEPS, STEP_S = 10, 0.1
TIME_LIMIT, FAILURE = 1000, 2000  # votes for max_minutes and by `give_up`; one for a signal is its number


class StopVote:
    """Decide on all processes alike whether to stop.

    With several processes the answer at step n is the vote of step n - 1: its small all-reduce ran beside the step, on
    the host, and costs neither a wait nor a device sync. They vote every ten steps, or in every step that is long.

    Args:
        control: a gloo group of all processes; None for one process.
        max_minutes: from now; None is no limit.
        timeout_s: how long a process waits for the others; `PATIENCE` in the first step and in those of
            `expect_compiling`.
        heartbeat: is told that limit.

    Attributes:
        reason: what asked for the stop, by name, once there is one: SIGTERM, max_minutes.
        signal: the number of the last signal that asked this process, also after the last step; 0 where none did.
    """

    def __init__(
        self, control: Any, *, max_minutes: float | None, timeout_s: float, heartbeat: Heartbeat | None = None
    ) -> None:
        self.control, self.max_minutes = control, max_minutes
        self.timeout_s, self.heartbeat = timeout_s, heartbeat
        self.reason = ""
        self.signal = 0
        self._started, self._failure = time.monotonic(), 0
        self._cast: tuple[Tensor, Any] | None = None
        self._calls, self._last_call, self._left = 0, -math.inf, 0
        self._compiling = {1}  # calls that end a step in which processes may compile for long
        self._handlers: dict[int, Any] = {}

    def watch_signals(self) -> None:
        """Let STOP_SIGNALS ask for a stop at the next step; a second SIGINT interrupts at once.

        A SIGHUP that is ignored, as under nohup, stays ignored.
        """

        def note(number: int, frame: object) -> None:
            if self.signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        if threading.current_thread() is not threading.main_thread():  # signals go to that one alone
            return
        for number in STOP_SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, note)

    def restore_signals(self) -> None:
        """Put back the handlers that `watch_signals` found."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def give_up(self) -> None:
        """Ask for a stop because something failed beside the steps, from any thread; what did is said elsewhere."""
        self._failure = FAILURE

    def __call__(self) -> bool:
        """Say whether to stop now; called by all processes after every step."""
        minutes = (time.monotonic() - self._started) / 60
        late = self.max_minutes is not None and minutes >= self.max_minutes
        mine = self._failure or self.signal or (TIME_LIMIT if late else 0)
        if self.control is None:
            return self._decide(mine)
        self._calls += 1
        self._set_patience()
        stop, now = self.last(), time.monotonic()
        steps, self._last_call = VOTE_STEPS if now - self._last_call < STEP_S else 1, now
        self._left -= 1
        if self._left <= 0:
            vote = torch.tensor([mine, -steps])  # the most of them: so the least number of steps
            self._cast = (vote, dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.control, async_op=True))
        return stop

    def expect_compiling(self, steps: Iterable[int]) -> None:
        """Name the steps, counted from 1 at this start, that may take long on one process and not on another.

        A new image size is compiled in them, or a first evaluation; with a cold cache that takes minutes.
        """
        self._compiling |= set(steps)

    def be_patient(self) -> None:
        """Give all processes the time that compiling may take, from here on."""
        if self.heartbeat is not None:
            self.heartbeat.limit_s = PATIENCE.total_seconds()

    def _set_patience(self) -> None:
        """Give the next step the time it needs; the limit shrinks again once all processes have done such a step."""
        if self._calls + 1 in self._compiling:
            self.be_patient()
        elif self._calls in self._compiling and self.heartbeat is not None:
            dist.barrier(group=self.control)
            self.heartbeat.limit_s = self.timeout_s

    def last(self) -> bool:
        """Wait for the vote that is under way and return its result; False where there is none."""
        if self._cast is None:
            return False
        vote, work = self._cast
        work.wait()
        self._cast = None
        asked, self._left = int(vote[0]), -int(vote[1])
        return self._decide(asked)

    def _decide(self, vote: int) -> bool:
        if vote and vote != FAILURE and not self.reason:
            self.reason = "max_minutes" if vote == TIME_LIMIT else signal.Signals(vote).name
            logger.info("%s: saving a checkpoint, then stopping", self.reason)
        return bool(vote)
