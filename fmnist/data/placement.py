"""Where the images of a run lie: on each process's device, spread over the processes, or in host memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from fmnist.data.split import Split
from fmnist.runtime.hardware import FREE_SHARE, free_bytes, host_bytes
from fmnist.runtime.processes import Processes

LABEL_BYTES = 8
Where = Literal["device", "spread", "host"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the images of a run lie.

    Attributes:
        where: the place.
        num_bytes: of images that a process holds there, the most that one does.
        world_size: of the processes.
    """

    where: Where
    num_bytes: int
    world_size: int

    def __str__(self) -> str:
        """Say where, and how much; empty for the device, which goes without saying."""
        size = f"{self.num_bytes / 2**20:,.1f} MiB of images"
        return {
            "device": "",
            "spread": f"; spread over {self.world_size} processes, {size} on each",
            "host": f"; in host memory, {size} for each process",
        }[self.where]


def place_of(where: Where, splits: Mapping[str, Split], world_size: int, batch_size: int) -> Placement:
    """Return a place, with the bytes that so many processes need there; batch_size as for `place`."""
    num_bytes = 0
    for name, split in splits.items():
        unit = 1 if name == "train" else batch_size  # training images are dealt one by one, the others by batches
        units = math.ceil(math.ceil(len(split) / unit) / world_size)
        most = units * unit if where == "spread" else len(split)
        num_bytes += min(most, len(split)) * split.images[:1].numel()
    return Placement(where=where, num_bytes=num_bytes, world_size=world_size)


def choose_place(
    wish: Literal["auto", "device", "spread", "host"],
    splits: Mapping[str, Split],
    batch_size: int,
    pyramid_bytes: int,
    processes: Processes,
    device: torch.device,
) -> Placement:
    """Decide where the images lie, on all processes alike.

    Args:
        wish: `data.where`; auto takes the first of device, spread and host with room: a tenth of what is free is left.
        splits: train, val and test, on the CPU or still in their file.
        batch_size: of evaluation, see `place`.
        pyramid_bytes: that come on top where a process holds all of them on its device.
        processes: that decide.
        device: of this process.

    Raises:
        ValueError: auto finds no room; one line.
    """
    world = processes.world_size
    total, share = (place_of(where, splits, world, batch_size).num_bytes for where in get_args(Where)[:2])
    # the process with the least room decides for all
    free, host = (min(room) for room in zip(*processes.gather((free_bytes(device), host_bytes())), strict=True))
    if wish == "auto":
        labels = LABEL_BYTES * sum(map(len, splits.values()))
        needed = {"device": total + pyramid_bytes + labels, "spread": share + labels, "host": total}
        on_cpu = device.type == "cpu"
        free += on_cpu * sum(split.images.numel() for split in splits.values() if split.unread is None)  # read already
        room = {"device": free, "spread": free if world > 1 else -1, "host": -1 if on_cpu else host}
        places: tuple[Where, ...] = ("device", "spread", "host")
        found = [place for place in places if needed[place] <= FREE_SHARE * room[place]]
        if not found and not on_cpu:
            raise ValueError(
                f"data.where is auto: {total / 2**30:.2f} GiB of images, of which {share / 2**30:.2f} GiB a process "
                f"when spread, and {free / 2**30:.2f} GiB are free on the device, {host / 2**30:.2f} GiB in host "
                "memory; valid: more processes, a smaller data.stored_size or data.limit"
            )
        wish = found[0] if found else "device"
    elif wish == "spread" and world == 1:
        wish = "device"  # the one process holds all
    return place_of(wish, splits, world, batch_size)


def place(
    splits: Mapping[str, Split], placement: Placement, processes: Processes, device: torch.device, batch_size: int
) -> dict[str, Split]:
    """Move labels to the device and images to their place; where they are spread, only this process's stay.

    Args:
        splits: train, val and test, on the CPU.
        placement: where to.
        processes: among which they are shared.
        device: of this process.
        batch_size: of evaluation, whose batches are shared as `predict` does: it finds its images where they lie.
    """
    placed = {}
    for name, split in splits.items():
        rows = None
        if placement.where == "spread":
            rows = processes.exchange.rows(len(split))
            if name != "train":
                mine = processes.share(range(0, len(split), batch_size))
                first, last = (mine[0], min(len(split), mine[-1] + batch_size)) if mine else (0, 0)
                rows = range(first, last)
        here = replace(split, labels=split.labels.to(device), rows=rows, sha256=split.digest)
        # in host memory a file of ours serves as it is: its pages are shared by a machine's processes
        if placement.where != "host":
            here = replace(here, images=split.at_rows(rows).to(device), unread=None)
        elif split.unread is not None and not split.unread.stays:
            here = replace(here, images=split.at_rows(rows), unread=None)
        placed[name] = here
    return placed
