"""Which process hangs, found out by a clock that stands still while its process does.

The libraries' own time limits count the hours that a job is suspended (`scontrol suspend`, SIGSTOP), and then end it.
So they are set far away, and a thread of each process counts instead: it tells the others once a second that it is
alive and how many collectives its process has begun, and where its own process waits, it looks who is behind.
"""

import atexit
import logging
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from fmnist.runtime.background import join_all

logger = logging.getLogger("fmnist")
# What rank 0 does alone may take this long while the others wait: a save, figures, Weights & Biases' farewell. So may
# the start: processes that import, read and compile at different speeds.
PATIENCE = timedelta(minutes=10)
# Of the libraries, once all processes have met: longer than a suspension, and milliseconds of it fit into 31 bits.
NEVER = timedelta(days=20)
BEAT_S = 1.0
STOOD_STILL_S = 10.0  # between two beats: an overloaded machine may miss some
# A checkpoint that is being written when a process ends for another one's sake may take so long to get its name: a
# launcher kills who is left after half a minute.
LAST_WORK_S = 20.0
# A process that ends for another one's sake stays this long: a launcher looks at its processes now and then (torchrun
# ten times a second) and names as the root cause the first it finds dead; of two found at once, the lower rank.
LINGER_S = 2.0


class Beat(NamedTuple):
    """What a process tells the others: its beats, and the collectives it has begun in the step and beside it."""

    number: int
    world: int
    control: int


class Waiting:
    """How long the others have not moved while this process waits, in seconds of its own running clock."""

    def __init__(self) -> None:
        self._mine: Beat | None = None
        self._seen: dict[int, Beat] = {}
        self._still: dict[int, float] = {}  # no beat
        self._idle: dict[int, float] = {}  # no new collective

    def waits(self, mine: Beat) -> bool:
        """Note this process' beat; say whether it has begun no collective since the last one."""
        moved = self._mine is None or self._mine[1:] != mine[1:]
        self._mine = mine
        if moved:
            self._seen, self._still, self._idle = {}, {}, {}
        return not moved

    def lost(self, others: dict[int, Beat], seconds: float, limit_s: float) -> list[int]:
        """Return the ranks that keep this process waiting for longer than the limit.

        Args:
            others: the last beat of every other rank.
            seconds: since the last call; what this process was suspended for does not count.
            limit_s: for a process without a beat, or behind in the step; `PATIENCE` for one behind in what rank 0
                does alone.
        """
        assert self._mine is not None
        found = []
        for rank, beat in others.items():
            before = self._seen.get(rank, Beat(-1, -1, -1))
            self._still[rank] = self._still[rank] + seconds if before.number == beat.number else 0.0
            self._idle[rank] = self._idle[rank] + seconds if before[1:] == beat[1:] else 0.0
            self._seen[rank] = beat
            behind = beat.world < self._mine.world and self._idle[rank] > limit_s
            late = beat.control < self._mine.control and self._idle[rank] > max(limit_s, PATIENCE.total_seconds())
            ahead = beat.world > self._mine.world or beat.control > self._mine.control  # it waits for this process
            if not ahead and (self._still[rank] > limit_s or behind or late):
                found.append(rank)
        return found


class Heartbeat(threading.Thread):
    """Beat for this process, and end it with one line where another one keeps it waiting.

    Args:
        rank, world_size: this process and how many there are.
        control: the group for what runs beside the step.
    """

    def __init__(self, rank: int, world_size: int, control: Any) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.ranks = rank, range(world_size)
        self.groups: tuple[Any, ...] = (dist.group.WORLD, control)
        self.limit_s = PATIENCE.total_seconds()
        self._over = threading.Event()
        # all processes have met in it, and nothing else uses it from here on
        self._store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store())
        for group in self.groups:
            group.set_timeout(NEVER)  # type: ignore[union-attr]
        self._beat(0)
        dist.barrier(group=control)  # everyone has beaten once
        atexit.register(self.stop)  # after an error too
        self.start()

    def watch(self, group: Any) -> None:
        """Count the collectives of another group as those of the step, in place of its own time limit."""
        group.set_timeout(NEVER)
        self.groups = (*self.groups, group)

    def stop(self) -> None:
        """Stop counting, and let go of the groups: one that outlives its threads aborts the process."""
        self._over.set()
        self.join(10 * BEAT_S)
        self.groups = ()

    def run(self) -> None:
        """Beat until stopped."""
        waiting, before, number = Waiting(), time.monotonic(), 0
        while not self._over.wait(BEAT_S):
            now = time.monotonic()
            passed, before, number = now - before, now, number + 1
            if passed > STOOD_STILL_S:
                logger.warning("rank %d was suspended for about %.0f s and is waiting again", self.rank, passed)
            try:
                mine = self._beat(number)
                if not waiting.waits(mine):
                    continue
                others = {rank: self._read(rank) for rank in self.ranks if rank != self.rank}
            except RuntimeError:  # the store is gone, and with it its process: the next collective says so
                continue
            if lost := waiting.lost(others, min(passed, 2 * BEAT_S), self.limit_s):
                who = f"rank {', '.join(map(str, lost))} does not answer: it hangs or is gone"
                end_for_another(self.rank, who, f"waited {self.limit_s:g} s")

    def _beat(self, number: int) -> Beat:
        world, control, *more = (group._get_sequence_number_for_group() for group in self.groups)
        beat = Beat(number, world + sum(more), control)
        self._store.set(str(self.rank), " ".join(map(str, beat)))
        return beat

    def _read(self, rank: int) -> Beat:
        return Beat(*map(int, self._store.get(str(rank)).split()))


def end_for_another(rank: int, who: str, why: str) -> None:
    """End this process with one line and status 1: an orderly exit would wait for the lost one."""
    logger.error("rank %d ends: %s; the same command resumes from the last checkpoint (%s)", rank, who, why)
    join_all(LAST_WORK_S)
    logging.shutdown()
    sys.stderr.flush()
    time.sleep(LINGER_S)  # let the launcher find the lost one dead first
    os._exit(1)
