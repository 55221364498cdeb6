"""The benchmark's options. Nothing here imports torch: --help and a misspelt option answer at once."""

import argparse
import re
from pathlib import Path
from typing import Any

from fmnist.runtime.arguments import CommandLine, existing, number

PROGRAM = "fmnist benchmark"
LOADERS = {
    "synthetic": "one synthetic batch repeated (no data path)",
    "ours-triton": "ours: one fused Triton kernel",
    "ours-compiled": "ours: plain torch, compiled",
    "ours-eager": "ours: plain torch, eager",
    "torchvision-pil": "torchvision DataLoader, PIL, a worker per core",
    "torchvision-pil-2": "torchvision DataLoader, PIL, 2 workers",
    "torchvision-pil-2-resize-first": "torchvision DataLoader, PIL, 2 workers, resize first",
    "torchvision-v2-batch": "torchvision v2 on the device, one draw per batch (weaker)",
    "torchvision-v2-image": "torchvision v2 on the device, image by image",
    "kornia": "kornia on the device, per sample",
    "kornia-resize-first": "kornia on the device, per sample, resize first",
}
# What depends on the device: (CPU, GPU). The CPU's work is smaller, so that `all` takes under five minutes.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "models": (["cnn@28"], ["cnn@28", "convnext_tiny@224"]),
    "variants": (["eager"], ["eager", "compiled"]),
    "large_batch": (0, 8192),
    "rounds": (7, 5),
    "seconds": (0.5, 1.0),
}
DESCRIPTION = f"""\
Race the data path against torchvision's and kornia's on this machine.

  data   the loaders alone: images/s delivered to the device
  train  the optimizer step of train.py fed by each loader; the synthetic batch is 1.00
  all    both
  colour the loaders alone on photographs, 256 to 224 px: random resized crop, flip, colour jitter
  plot   draw the chart of a JSON file again: plot FILE.json
  accuracy  train.py's time to an accuracy, over several seeds: accuracy --help
  programs  train.py against timm's own train.py and benchmark.py, run as they are: programs --help

Each loader must first pass a correctness gate: with given parameters its images lie within 2/255 of a float64 warp, and
its labels come in the common order. A loader that fails is not timed, and the exit status is 1.

loaders:
{chr(10).join(f"  {name:31}{text}" for name, text in LOADERS.items())}

examples:
  fmnist benchmark data --sizes 224 --loaders ours-compiled torchvision-pil-2 kornia
  fmnist benchmark train --models convnext_tiny@224 --variants eager compiled --batch 1024
  torchrun --nproc_per_node 4 -m fmnist.benchmark train --scaling --baseline one.json --output runs/four
"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; an option that was not given and whose default depends on the device stays None."""
    usage = f"{PROGRAM} {{data,train,all,colour,plot,accuracy,programs}} [options]"
    parser = CommandLine(prog=PROGRAM, usage=usage, description=DESCRIPTION, joined=True)

    def add(flag: str, text: str, **kwargs: Any) -> None:
        values = [" ".join(map(str, v)) if isinstance(v, list) else v for v in DEFAULTS.get(flag.strip("-"), ())]
        parser.add_argument(flag, help=text + (f" (CPU: {values[0]}; GPU: {values[1]})" if values else ""), **kwargs)

    add("mode", "what to race", choices=("data", "train", "all", "colour", "plot"))
    add("file", "with plot: the JSON file", nargs="?", type=existing)
    add("--loaders", "default: all", nargs="+", choices=LOADERS, default=list(LOADERS), metavar="NAME")
    add("--sizes", "pixels, for data (default: 28 224)", nargs="+", type=int, default=[28, 224], metavar="PX")
    add("--models", "for train", nargs="+", metavar="NAME@PX")
    add("--variants", "for train", nargs="+", choices=("eager", "compiled"), metavar="V")
    add("--batch", "images per batch and process (default: 256)", type=number(4, 8192), default=256)
    text = "for data: race ours again at this batch, where launching costs little; 0: do not"
    add("--large_batch", text, type=number(0, 65536))
    add("--rounds", "interleaved rounds", type=number(1, 100))
    add("--seconds", "target length of a timed round", type=number(0.01, 600, float))
    add("--scaling", "train under torchrun: only ours and synthetic, over all processes", action="store_true")
    add("--baseline", "with --scaling: JSON of the same command on one process", type=existing, metavar="JSON")
    add("--profile", "with train: then time a step's classes of operators, or kernels", action="store_true")
    add("--allocator", "on a CPU: keep freed memory, as train.py does", choices=("kept", "default"), default="kept")
    add("--output", "write STEM.json and STEM.png", type=Path, default=Path("runs/benchmark"), metavar="STEM")
    parser.add_force()
    options = parser.parse_args(argv)

    if (options.mode == "plot") != (options.file is not None):
        parser.error("plot takes a JSON file; the other modes take none")
    if options.scaling and options.mode != "train" or options.baseline and not options.scaling:
        parser.error("--scaling requires train, and --baseline requires --scaling")
    if options.profile and options.mode not in ("train", "all"):
        parser.error("--profile requires train or all: it is of the training step")
    for model in options.models or []:
        if not re.fullmatch(r"[\w.]+@\d+", model):
            parser.error(f"--models {model!r} is not NAME@PIXELS, e.g. convnext_tiny@224")
    for size in options.sizes + [int(model.split("@")[1]) for model in options.models or []]:
        if not 8 <= size <= 512 or size % 4:  # the gate erases quarters
            parser.error(f"{size} pixels; valid range: multiples of 4 from 8 to 512")
    return options
