"""Several processes and one that fails: all of them end soon, with one line that names it."""

import queue
import re
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PROBE = timedelta(seconds=5)
# How the libraries say that a collective failed for another process' sake; any other RuntimeError is our own fault.
SIGNS = (
    "gloo",
    "NCCL",
    "imed out",
    "timeout",
    "onnection closed",
    "onnection reset",
    "onnection refused",
    "Broken pipe",
)


def share_status(status: int, group: Any) -> int:
    """Give every process rank 0's status; they wait for it."""
    flag = torch.tensor(status)
    dist.broadcast(flag, 0, group=group)
    return int(flag)


def is_lost_process(error: RuntimeError) -> bool:
    """Say whether a collective failed because another process died or hangs."""
    return any(sign in str(error) for sign in SIGNS)


def describe_loss(error: RuntimeError, group: Any, others: list[int]) -> str:
    """Find out which process is lost, and say it in a few words.

    Args:
        error: what the collective raised.
        group: a gloo group of all processes, used for nothing else at this moment.
        others: the other processes' ranks.
    """
    hangs = "imed out" in str(error) or "timeout" in str(error)
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            dist.monitored_barrier(group=group, timeout=PROBE, wait_all_ranks=True)
        except RuntimeError as failure:
            answers.put(str(failure))
        else:
            answers.put("")

    threading.Thread(target=ask, daemon=True).start()  # only rank 0's barrier obeys its timeout; the others wait for it
    try:
        answer = answers.get(timeout=2 * PROBE.total_seconds())
    except queue.Empty:
        answer = "send/recv from rank 0"
    found = re.search(r"[Rr]anks? ([\d, ]+) failed to pass|send/recv from rank (\d+)", answer)
    ranks = next((part for part in found.groups() if part), "") if found else ""
    if not ranks and len(others) == 1:
        ranks = str(others[0])
    who = f"rank {ranks}" if ranks else "another rank"
    return f"{who} {'does not answer: it hangs or is gone' if hangs else 'is gone'}"
