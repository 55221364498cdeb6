"""Race our depthwise kernels against cuDNN's on a GPU, pass by pass: every tile of a grid, after a check in float64.

    python -m experiments.depthwise_gpu                                   # two and a half minutes at most
    python -m experiments.depthwise_gpu --table                           # the tiles in use alone, half a minute
    TRITON_INTERPRET=1 python -m experiments.depthwise_gpu --tiny         # no GPU: that it runs, not how fast

Device time is the median of triton's `do_bench`, which empties the L2 cache before each call. The gradient of the
images is the forward's kernel with its taps in reverse order, so one grid serves both. The tiles of
fmnist/models/depthwise_triton.py are read off the table that comes last.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fmnist.models.depthwise_kernels import convolve, correlate
from fmnist.models.depthwise_triton import (
    Tile,
    constants,
    forward_tile,
    launch_convolve,
    launch_correlate,
    weights_tile,
)
from fmnist.runtime.environment import ENVIRONMENT
from fmnist.runtime.files import write_json
from fmnist.runtime.provenance import measured_now

OUTPUT = Path(__file__).parent / "results" / "depthwise_gpu.json"
BATCH = 256
PEAK_FMA = 33.5e12  # a second, float32, of an H100 or H200 by its data sheet
INTERPRETED = ENVIRONMENT.get("TRITON_INTERPRET") == "1"


class Shape(NamedTuple):
    """A layer: a map of side x side pixels, and how often ConvNeXt-Tiny has it at 224 px."""

    side: int
    channels: int
    kernel: int
    layers: int

    def images(self) -> Tensor:
        """Return its shape."""
        return torch.empty((1, self.channels, self.side, self.side), device="meta")


# rows, strip, units, channels, warps; the most promising first, since time may run out
FORWARD: dict[Shape, list[Tile]] = {
    Shape(56, 96, 7, 3): [
        *(Tile(2, 14, 8, 32, 4), Tile(4, 7, 8, 32, 4), Tile(4, 14, 4, 32, 4), Tile(2, 7, 8, 32, 4)),
        *(Tile(7, 7, 4, 32, 4), Tile(2, 14, 2, 32, 1), Tile(4, 7, 2, 32, 1), Tile(2, 7, 16, 32, 4)),
    ],
    Shape(28, 192, 7, 3): [
        *(Tile(2, 14, 4, 64, 4), Tile(4, 7, 4, 64, 4), Tile(4, 14, 4, 32, 4), Tile(7, 7, 2, 64, 4)),
        *(Tile(2, 14, 1, 64, 1), Tile(2, 7, 4, 64, 4), Tile(4, 7, 1, 64, 1)),
        Tile(2, 28, 4, 32, 4),
    ],
    Shape(14, 384, 7, 9): [
        *(Tile(2, 14, 1, 128, 2), Tile(7, 7, 1, 128, 4), Tile(7, 14, 1, 64, 2), Tile(2, 7, 1, 128, 2)),
        *(Tile(2, 14, 4, 64, 4), Tile(7, 7, 1, 64, 2), Tile(1, 14, 1, 128, 2)),
    ],
    Shape(7, 768, 7, 3): [
        *(Tile(7, 7, 1, 128, 4), Tile(7, 7, 1, 64, 2), Tile(7, 7, 1, 64, 1), Tile(2, 7, 1, 128, 2)),
        Tile(1, 7, 1, 256, 4),
    ],
    Shape(112, 96, 3, 0): [Tile(4, 14, 4, 32, 4), Tile(4, 7, 8, 32, 4), Tile(2, 7, 8, 32, 4), Tile(2, 7, 16, 32, 4)],
    Shape(28, 240, 5, 0): [Tile(4, 7, 8, 32, 4), Tile(2, 14, 8, 16, 2)],
}
# the same and the number of programs
WEIGHTS: dict[Shape, list[Tile]] = {
    Shape(56, 96, 7, 3): [
        *(Tile(2, 7, 4, 32, 4, 528), Tile(4, 7, 4, 32, 4, 528), Tile(2, 14, 4, 32, 4, 528), Tile(2, 7, 8, 32, 4, 528)),
        *(Tile(4, 7, 4, 32, 4, 1056), Tile(4, 7, 4, 32, 4, 396), Tile(7, 7, 4, 32, 4, 528)),
    ],
    Shape(28, 192, 7, 3): [
        *(Tile(2, 7, 4, 32, 4, 528), Tile(4, 7, 2, 64, 4, 528), Tile(4, 7, 4, 32, 4, 528), Tile(4, 7, 4, 32, 4, 1056)),
        *(Tile(2, 14, 4, 32, 4, 528), Tile(7, 7, 2, 64, 4, 528)),
    ],
    Shape(14, 384, 7, 9): [
        *(Tile(7, 7, 1, 128, 4, 528), Tile(2, 14, 1, 128, 4, 528), Tile(2, 7, 1, 128, 4, 528)),
        *(Tile(2, 14, 1, 128, 4, 1056), Tile(7, 14, 1, 128, 4, 396), Tile(7, 7, 1, 128, 4, 1056)),
    ],
    Shape(7, 768, 7, 3): [
        *(Tile(7, 7, 1, 128, 4, 528), Tile(7, 7, 1, 128, 4, 1056), Tile(2, 7, 1, 128, 4, 528)),
        Tile(7, 7, 1, 64, 2, 1056),
    ],
    Shape(112, 96, 3, 0): [Tile(4, 14, 4, 32, 4, 528), Tile(4, 7, 8, 32, 4, 528)],
    Shape(28, 240, 5, 0): [Tile(4, 7, 4, 32, 4, 528)],
}
TINY = Shape(9, 16, 3, 1)


def compile_one(pass_: str, shape: Shape, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """Compile a kernel into triton's cache on disk, in a process of its own; return its registers and spills."""
    known = constants(shape.images(), shape.kernel, tile)
    if pass_ == "forward":
        arguments = (dtype, torch.float32, torch.float32, dtype, BATCH, 0, shape.channels, 0)
        made = convolve.warmup(*arguments, grid=(1,), **known)
    else:
        made = correlate.warmup(dtype, dtype, torch.float32, BATCH, grid=(1,), **known)
    made._init_handles()
    return {"registers": made.n_regs, "spills": made.n_spills}


def compile_all(jobs: list[tuple[Any, ...]], seconds: float) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Compile many kernels at once; those that fail, or are not done in time, say so."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {job: {"error": "not compiled in time"} for job in jobs}
    pool = ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn"))
    waiting = {pool.submit(compile_one, *job): job for job in jobs}
    try:
        for done in as_completed(waiting, timeout=seconds):
            try:
                found[waiting[done]] = done.result()
            except Exception as error:  # noqa: BLE001 - whatever the compiler says is a result here
                found[waiting[done]] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    except TimeoutError:
        pass
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    return found


def milliseconds(work: Any) -> float:
    if INTERPRETED:
        begun = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - begun)
    return float(triton.testing.do_bench(work, warmup=10, rep=40, return_mode="median"))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())


class Layer:
    """A layer's tensors, and what is right in float64 for its first images."""

    def __init__(self, shape: Shape, batch: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape = shape
        size = (batch, shape.channels, shape.side, shape.side)
        torch.manual_seed(0)
        made = (torch.randn(size, device=device).to(dtype) for _ in range(2))
        self.images, self.gradient = (part.contiguous(memory_format=torch.channels_last) for part in made)
        self.weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel, device=device) / shape.kernel
        self.bias = torch.randn(shape.channels, device=device)
        self.taps = self.weight.flatten(1).t().contiguous()
        few = slice(0, min(16, batch))  # as the whole batch, it divides by 16 where that does: the same kernel
        self.few = [part[few].contiguous(memory_format=torch.channels_last) for part in (self.images, self.gradient)]
        exact = [part.detach().double().requires_grad_() for part in (self.few[0], self.weight, self.bias)]
        out = F.conv2d(*exact, padding=shape.kernel // 2, groups=shape.channels)
        self.right = [out.detach(), *torch.autograd.grad(out, exact, self.few[1].double())]

    def forward(self, tile: Tile, images: Tensor) -> Tensor:
        return launch_convolve(images, self.taps, self.bias, False, tile)

    def check(self, pass_: str, tile: Tile) -> dict[str, Any]:
        """Return relative errors in the norm, and whether two runs have the same bits."""
        if pass_ == "forward":
            runs = [
                (self.forward(tile, self.few[0]), launch_convolve(self.few[1], self.taps, None, True, tile))
                for _ in range(2)
            ]
            wanted = self.right[:2]
        else:
            kernel = self.shape.kernel
            both = [launch_correlate(*self.few, kernel, tile) for _ in range(2)]
            runs = [(part[:-1].t().reshape(self.weight.shape), part[-1]) for part in both]
            wanted = self.right[2:]
        errors = [distance(part, exact) for part, exact in zip(runs[0], wanted, strict=True)]
        return {"errors": errors, "same_bits": all(torch.equal(a, b) for a, b in zip(*runs, strict=True))}

    def cudnn(self) -> dict[str, float]:
        shape, dtype = self.shape, self.images.dtype
        weight = self.weight.to(dtype).contiguous(memory_format=torch.channels_last)
        bias = self.bias.to(dtype)
        pad, one = [shape.kernel // 2] * 2, [1, 1]

        def backward(mask: list[bool]) -> Any:
            arguments = (self.gradient, self.images, weight, [shape.channels], one, pad, one, False, [0, 0])
            return torch.ops.aten.convolution_backward(*arguments, shape.channels, mask)

        return {
            "forward": milliseconds(
                lambda: F.conv2d(self.images, weight, bias, padding=shape.kernel // 2, groups=shape.channels)
            ),
            "dgrad": milliseconds(lambda: backward([True, False, False])),
            "wgrad": milliseconds(lambda: backward([False, True, True])),
            "copy": milliseconds(lambda: self.images.clone()),
        }


def race(layer: Layer, jobs: list[tuple[Any, ...]], compiled: dict[Any, dict[str, Any]], until: float) -> list[Any]:
    """Return one record for every tile of a layer."""
    rows = []
    for job in jobs:
        pass_, _, tile, dtype = job
        row: dict[str, Any] = {"pass": pass_, "tile": tile._asdict(), **compiled.get(job, {})}
        rows.append(row)
        if "error" in row:
            continue
        if time.monotonic() > until:
            row["error"] = "no time left"
            continue
        try:
            row |= layer.check(pass_, tile)
            if dtype != layer.images.dtype:
                continue
            if pass_ == "forward":
                row["forward"] = milliseconds(lambda tile=tile: layer.forward(tile, layer.images))
                row["dgrad"] = milliseconds(
                    lambda tile=tile: launch_convolve(layer.gradient, layer.taps, None, True, tile)
                )
            else:
                row["wgrad"] = milliseconds(
                    lambda tile=tile: launch_correlate(layer.images, layer.gradient, layer.shape.kernel, tile)
                )
        except Exception as error:  # noqa: BLE001 - one bad tile must not end the race
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(
            layer.shape.side,
            pass_,
            tuple(tile),
            {k: v for k, v in row.items() if k not in ("pass", "tile")},
            flush=True,
        )
    return rows


def summary(shape: Shape, batch: int, cudnn: dict[str, float], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the best tile of each pass."""
    values = batch * shape.side**2 * shape.channels
    found = []
    for pass_ in ("forward", "dgrad", "wgrad"):
        timed = [row for row in rows if pass_ in row]
        if timed:
            best = min(timed, key=lambda row: row[pass_])
            seconds = best[pass_] / 1e3
            found.append(
                {
                    "pass": pass_,
                    "tile": tuple(best["tile"].values()),
                    "ms": best[pass_],
                    "GB/s": 4 * values / seconds / 1e9,
                    "of FMA peak": values * shape.kernel**2 / seconds / PEAK_FMA,
                    "cudnn_ms": cudnn[pass_],
                }
            )
    return found


def print_table(layers: list[dict[str, Any]]) -> None:
    ours = theirs = 0.0
    print(f"{'layer':18} {'pass':8} {'tile':28} {'ms':>7} {'GB/s':>6} {'FMA':>5} {'cuDNN ms':>9} {'ratio':>6}")
    for layer in layers:
        shape = Shape(**layer["shape"])
        for best in layer["best"]:
            name = f"{shape.side}x{shape.side}x{shape.channels} k{shape.kernel}"
            numbers = f"{best['ms']:7.3f} {best['GB/s']:6.0f} {best['of FMA peak']:5.0%} {best['cudnn_ms']:9.3f}"
            print(f"{name:18} {best['pass']:8} {best['tile']!s:28} {numbers} {best['cudnn_ms'] / best['ms']:6.2f}")
            ours += shape.layers * best["ms"]
            theirs += shape.layers * best["cudnn_ms"]
    print(f"all depthwise work of a step of ConvNeXt-Tiny: {ours:.2f} ms, cuDNN {theirs:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one small layer")
    parser.add_argument("--table", action="store_true", help="only the tiles that training uses")
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    begun = time.monotonic()
    device, batch = ("cpu", 3) if INTERPRETED else (str(torch.accelerator.current_accelerator()), BATCH)
    forward = {TINY: [Tile(2, 7, 2, 16, 1)]} if args.tiny else FORWARD
    weights = {TINY: [Tile(2, 7, 2, 16, 1, 5)]} if args.tiny else WEIGHTS
    if args.table:
        forward = {shape: [forward_tile(shape.images(), shape.kernel)] for shape in forward}
        weights = {shape: [weights_tile(shape.images(), shape.kernel)] for shape in forward}
    jobs: list[tuple[Any, ...]] = []
    for place in range(max(map(len, [*forward.values(), *weights.values()]))):
        for shape in forward:
            jobs += [("forward", shape, tile, torch.bfloat16) for tile in forward[shape][place : place + 1]]
            jobs += [("weights", shape, tile, torch.bfloat16) for tile in weights[shape][place : place + 1]]
    alike = {(job[0], job[1], job[2]._replace(programs=0), job[3]): job for job in jobs}  # their number is no constant
    compiled = {} if INTERPRETED else compile_all(list(alike.values()), 0.6 * args.seconds)
    compiled |= {job: compiled.get(alike[job[0], job[1], job[2]._replace(programs=0), job[3]], {}) for job in jobs}
    print(f"compiled in {time.monotonic() - begun:.0f} s", flush=True)
    layers = []
    for shape in forward:
        layer = Layer(shape, batch, device)
        cudnn = layer.cudnn()
        rows = race(layer, [job for job in jobs if job[1] == shape], compiled, begun + args.seconds)
        best = summary(shape, batch, cudnn, rows)
        layers.append({"shape": shape._asdict(), "cudnn": cudnn, "best": best, "grid": rows})
        del layer
    result = {
        "command": " ".join(["python -m experiments.depthwise_gpu", *sys.argv[1:]]),
        **(about := measured_now(device="interpreter" if INTERPRETED else torch.cuda.get_device_name())),
        "batch": batch,
        "seconds": time.monotonic() - begun,
        "versions": about["versions"] | {"triton": triton.__version__},
        "layers": layers,
    }
    write_json(args.output, result)
    print_table(layers)


if __name__ == "__main__":
    main()
