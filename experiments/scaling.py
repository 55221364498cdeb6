"""What limits training on 1 to 512 GPUs with the images spread over them, on paper; and what a CPU can measure of it.

python -m experiments.scaling [--figure docs/scaling.png] [--out experiments/results/scaling.json]

Nothing of the table is measured on a GPU. Each number is one division of a constant below by another, so that whoever
doubts one can change it. Measured, here and now: the memory of a process against the number of processes, and the
processor time to plan an exchange.
"""

import argparse
import datetime
import math
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.markdown import markdown_table
from fmnist.data.mapped import Mapped
from fmnist.data.placement import place, place_of
from fmnist.data.split import Split
from fmnist.runtime.exchange import Exchange
from fmnist.runtime.files import write_json
from fmnist.runtime.processes import Processes
from fmnist.runtime.provenance import git_revision, processor, versions

GPUS = tuple(2**power for power in range(10))

# One GPU: H100 SXM. Source: NVIDIA H100 data sheet (80 GB; 989.5 Tflop/s dense bf16; NVLink 900 GB/s, both directions).
GPU_BYTES, PEAK_FLOPS = 80e9, 989.5e12
# Bytes per second and GPU in one direction.
# Sources: the same data sheet, half of 900 GB/s; PCI Express 5.0: 32 GT/s x 16 lanes x 128/130 / 8 bits; InfiniBand
# NDR: 400 Gbit/s a port, one port a GPU as in NVIDIA's DGX H100 user guide.
LINKS = {"NVLink": 450e9, "PCIe": 32e9 * 16 * 128 / 130 / 8, "InfiniBand": 400e9 / 8}
PER_NODE = 8  # GPUs; DGX H100
DISK = 2e9  # bytes per second that one process writes; an assumption: a shared file system of a cluster
SMALL = 4096  # bytes; an assumption: 50 GB/s carry them in 0.08 us, and any message takes some microseconds
UTILISATION = 0.2  # of the peak that a step reaches: an assumption, on the slow side for large matrices, not for images
LABEL_AND_TABLE = 8 + 4 * (26 + 29) + 8  # bytes of an image on every GPU: label, uniforms, parameters, order


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a data set.

    Attributes:
        num_images, image_bytes: of the training images.
        parameters: of the model.
        flops: of an image, forward and backward; tests/test_scaling.py counts parameters and FLOPs again.
        micro_batch: images per step and GPU.
        decode_s: processor seconds to decode and crop one JPEG, for a loader on the host; 0 where none is decoded.
    """

    num_images: int
    image_bytes: int
    parameters: int
    flops: float
    micro_batch: int
    decode_s: float


CASES = {
    # 500 x 375 px on average; 5 ms a picture on one core: an assumption, between Pillow and Pillow-SIMD.
    "ConvNeXt-Tiny, 224 px, ImageNet stored at 256 px": Case(
        num_images=1_281_167,
        image_bytes=3 * 256 * 256,
        parameters=28_589_128,
        flops=26_704_286_208,
        micro_batch=128,
        decode_s=5e-3,
    ),
    "CNN, 28 px, Fashion-MNIST": Case(
        num_images=55_000,
        image_bytes=28 * 28,
        parameters=278_890,
        flops=130_967_040,
        micro_batch=128,
        decode_s=0.0,
    ),
}


def row(case: Case, gpus: int) -> dict[str, float]:
    """Return the numbers of one step on so many GPUs; times in seconds, each as if alone.

    Args:
        case: model and data.
        gpus: processes, one a GPU, in nodes of PER_NODE.
    """
    near = min(gpus, PER_NODE)
    batch_bytes = case.micro_batch * case.image_bytes
    gradients = 4 * case.parameters  # fp32
    # A ring all-reduce sends 2 (W - 1) / W of the gradients; within a node first, then one share of each GPU between.
    within = 2 * (near - 1) / near * gradients
    nodes = gpus // near
    between = 2 * (nodes - 1) / nodes * gradients / near
    compute = case.micro_batch * case.flops / (UTILISATION * PEAK_FLOPS)
    return {
        "bytes": math.ceil(case.num_images / gpus) * case.image_bytes
        + case.num_images * LABEL_AND_TABLE
        + 2 * batch_bytes,
        "compute_s": compute,
        "message_bytes": batch_bytes / gpus,  # from one GPU to another
        "exchange_nvlink_s": batch_bytes * (near - 1) / gpus / LINKS["NVLink"],
        "exchange_pcie_s": batch_bytes * (near - 1) / gpus / LINKS["PCIe"],
        "exchange_infiniband_s": batch_bytes * (gpus - near) / gpus / LINKS["InfiniBand"],
        "allreduce_nvlink_s": within / LINKS["NVLink"] + between / LINKS["InfiniBand"],
        "allreduce_pcie_s": within / LINKS["PCIe"] + between / LINKS["InfiniBand"],
        "checkpoint_s": 3 * gradients / DISK,  # weights and AdamW's two moments
        "decoding_cores": case.decode_s * PER_NODE * case.micro_batch / compute,  # of a node, for a loader on the host
    }


def begins(case: Case) -> dict[str, int | None]:
    """Return where each limit begins, the least number of GPUs of GPUS; None: not up to 512.

    `messages`: those of the exchange are smaller than SMALL, so that their number counts and not their bytes.
    `fits`: the images take at most nine tenths of a GPU, which leaves 8 GB to the model; the others: a time exceeds
    that of the arithmetic, so that it cannot be hidden behind it; `epoch`: an epoch has fewer than ten steps.
    """
    rows = {gpus: row(case, gpus) for gpus in GPUS}

    def first(holds: Any) -> int | None:
        return next((gpus for gpus, found in rows.items() if holds(gpus, found)), None)

    return {
        "fits": first(lambda _, found: found["bytes"] <= 0.9 * GPU_BYTES),
        "exchange": first(
            lambda _, found: max(found["exchange_pcie_s"], found["exchange_infiniband_s"]) > found["compute_s"]
        ),
        "allreduce": first(lambda _, found: found["allreduce_pcie_s"] > found["compute_s"]),
        "messages": first(lambda gpus, found: gpus > 1 and found["message_bytes"] < SMALL),
        "epoch": first(lambda gpus, _: case.num_images // (gpus * case.micro_batch) < 10),
    }


def measure_memory(num_images: int, side: int, counts: tuple[int, ...]) -> dict[int, float]:
    """Return the memory of the first of so many processes beyond what it had before it read its images, in bytes.

    Each is a fork that reads its own rows from a file of colour images and ends.
    """
    found = {}
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.lib.format.open_memmap(file.name, "w+", np.uint8, (num_images, 3, side, side)).flush()
        images = torch.from_numpy(np.load(file.name, mmap_mode="c"))
        for world_size in counts:
            reader, writer = os.pipe()
            if (child := os.fork()) == 0:
                torch.set_num_threads(1)  # a fork has none of its parent's threads
                os.write(writer, str(_memory_of_a_share(images, world_size)).encode())
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as answer:
                found[world_size] = float(answer.read())
            os.waitpid(child, 0)
    return found


def _memory_of_a_share(images: torch.Tensor, world_size: int) -> int:
    def anonymous() -> int:  # without the pages of files, which a machine's processes share
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    unread = Mapped(array=images, at=torch.arange(len(images)))
    labels = torch.zeros(len(images), dtype=torch.int64)
    split = Split(images=unread.outline, unread=unread, labels=labels, sha256="0")
    processes = Processes(0, 1)
    processes.exchange = Exchange()
    processes.world_size = processes.exchange.world_size = world_size
    before = anonymous()
    placement = place_of("spread", {"train": split}, world_size, 500)
    held = place({"train": split}, placement, processes, torch.device("cpu"), 500)["train"]
    del images, unread, split
    after = anonymous()
    assert len(held.images) == -(-len(labels) // world_size)
    return after - before


def measure_planning(micro_batch: int, counts: tuple[int, ...], repeats: int = 20) -> dict[int, float]:
    """Return the processor seconds to find out what to send and receive of one micro-batch, the median of some."""
    found = {}
    for world_size in counts:
        exchange = Exchange()
        exchange.world_size = world_size
        wanted = list(torch.randperm(world_size * micro_batch).view(world_size, micro_batch))
        times = []
        for _ in range(repeats):
            start = time.thread_time()
            exchange.plan(wanted)
            times.append(time.thread_time() - start)
        found[world_size] = statistics.median(times)
        exchange.close()
    return found


def table(case: Case) -> str:
    """Return the rows of a case as Markdown."""
    rows = []
    for gpus in GPUS:
        found = row(case, gpus)
        t = {name.removesuffix("_s"): _unit(value, TIMES) for name, value in found.items() if name.endswith("_s")}
        held, message = (_unit(found[name], SIZES) for name in ("bytes", "message_bytes"))
        exchange = f"{t['exchange_nvlink']} or {t['exchange_pcie']}, and {t['exchange_infiniband']}"
        reduce = f"{t['allreduce_nvlink']} or {t['allreduce_pcie']}"
        rows.append((gpus, held, t["compute"], exchange, message, reduce))
    exchanged = "exchange by NVLink or PCIe, and InfiniBand"
    return markdown_table(("GPUs", "images on each", "arithmetic", exchanged, "message", "all-reduce"), rows)


TIMES = ((1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))


def _unit(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """Return a value to three digits in the largest unit of which it is one or more."""
    size, name = next((unit for unit in units if value >= unit[0]), units[-1])
    return f"{value / size:.3g} {name}" if value else "0"


def draw(path: Path, memory: dict[int, float], planning: dict[int, float], image_bytes: int) -> None:
    """Draw the times of a step and the memory against the number of GPUs; what is measured as points."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 5), layout="constrained")
    points = planning.keys(), [1000 * seconds for seconds in planning.values()]
    for ax, (name, case) in zip(axes, CASES.items(), strict=False):
        rows = [row(case, gpus) for gpus in GPUS]
        for key, label, style in (
            ("compute_s", f"arithmetic, {UTILISATION:.0%} of the peak", "k-"),
            ("exchange_pcie_s", "exchange in a node, PCIe", "C0-"),
            ("exchange_nvlink_s", "exchange in a node, NVLink", "C0--"),
            ("exchange_infiniband_s", "exchange between nodes, InfiniBand", "C0:"),
            ("allreduce_pcie_s", "gradients, PCIe", "C1-"),
            ("allreduce_nvlink_s", "gradients, NVLink", "C1--"),
        ):
            ax.loglog(GPUS, [1000 * found[key] or math.nan for found in rows], style, label=label)
        ax.loglog(*points, "C2o", label="planning of an exchange, one CPU core: measured")
        ax.set(title=", ".join(name.split(", ")[:2]), xlabel="GPUs", ylabel="ms a step, each alone")
    for number, (name, case) in enumerate(CASES.items()):
        each = [row(case, gpus)["bytes"] / 1e9 for gpus in GPUS]
        axes[2].loglog(GPUS, each, f"C{number}-", label=name.partition("px, ")[2])
    axes[2].axhline(0.9 * GPU_BYTES / 1e9, color="grey", linestyle="--", label="nine tenths of 80 GB")
    shares = memory.keys(), [held / 1e9 for held in memory.values()]
    axes[2].loglog(*shares, "C2o", label=f"{image_bytes / 1e9:.2f} GB, CPU processes: measured")
    axes[2].set(title="Images on each", xlabel="GPUs, or processes", ylabel="GB")
    for ax in axes:
        ax.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--num_images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=64)
    args = parser.parse_args()
    for name, case in CASES.items():
        found = row(case, PER_NODE)
        print(f"{name}\n{table(case)}\nlimits begin at: {begins(case)}")
        print(f"checkpoint {1000 * found['checkpoint_s']:.0f} ms; a loader on the host would need "
              f"{found['decoding_cores']:.0f} cores a node to decode\n")  # fmt: skip
    torch.set_num_threads(1)
    memory = measure_memory(args.num_images, args.side, (1, 2, 4, 8))
    planning = measure_planning(128, GPUS)
    image_bytes = args.num_images * 3 * args.side**2
    print("memory of a process, as a part of all images:", {w: round(b / image_bytes, 4) for w, b in memory.items()})
    print("planning, ms of processor time:", {w: round(1000 * s, 3) for w, s in planning.items()})
    if args.out:
        content = {
            "command": "python -m experiments.scaling",
            "date": datetime.date.today().isoformat(),
            "hardware": f"{processor()}, one thread; processor time, on a machine busy with other work",
            "memory_bytes": memory,
            "image_bytes": image_bytes,
            "planning_s": planning,
            "limits": {name: begins(case) for name, case in CASES.items()},
            "versions": versions(),
            "git_revision": git_revision(),
        }
        write_json(args.out, content)
    if args.figure:
        draw(args.figure, memory, planning, image_bytes)


if __name__ == "__main__":
    main()
