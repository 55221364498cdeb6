"""Check what this machine has, one line each: ok, note (it works; what would improve it), or fail and what to do.

The exit status is 1 where a run would fail. Launched as a run would be, it also checks the sum over all processes:
torchrun --nproc_per_node 4 -m fmnist doctor
"""

import importlib.util
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from fmnist.runtime.arguments import CommandLine
from fmnist.runtime.console import counted, log_to_console, one_line, one_line_errors
from fmnist.runtime.environment import ENVIRONMENT
from fmnist.runtime.launcher import is_sibling

MIN_FREE_BYTES = 1 << 30  # a run's checkpoints at once: three of a ConvNeXt-Tiny with its optimizer
PARSER = CommandLine(prog="fmnist doctor", description=__doc__, joined=True)
PARSER.add_argument("--output", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs are written")
PARSER.add_argument("--data.name", dest="data", default="fashion_mnist", help="the data set (default: fashion_mnist)")
PARSER.add_argument("--data.root", dest="root", help="where it lies, as a run would be given it")
PARSER.add_device()
PARSER.add_argument("--json", action="store_true", help="print one JSON object, for scripts")


class Line(NamedTuple):
    """One answer: its subject; ok, note or fail; what was found, and what to do."""

    name: str
    state: str
    text: str


def check_software() -> Iterator[Line]:
    """Versions of Python and of the libraries."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Line("python", "ok" if sys.version_info >= (3, 11) else "fail", f"{python} (3.11 or later is needed)")
    import torch

    yield Line("torch", "ok", ", ".join([torch.__version__, *(f"{n} {version(n)}" for n in ("timm", "accelerate"))]))
    compiler = next(filter(shutil.which, (ENVIRONMENT.get("CXX", ""), "g++", "clang++", "c++")), None)
    found = f"C++ compiler {compiler}" if compiler else "no C++ compiler: install g++ before model.compile is used"
    yield Line("compile", "ok" if compiler else "note", found)


def check_device(name: str | None) -> Iterator[Line]:
    """The device that a run would take, and its arithmetic."""
    import torch

    from fmnist.runtime.hardware import describe_device, open_device, resolve_precision

    device = open_device(name)
    count = torch.accelerator.device_count() if device.type != "cpu" else 0
    others = f", {count} of them" if count > 1 else ""
    yield Line("device", "ok" if count else "note", describe_device(device) + (others if count else "; no GPU"))
    precision = resolve_precision("auto", device)
    yield Line("bf16", "ok" if precision == "bf16" else "note", f"--model.precision auto means {precision} here")


def check_all_reduce(name: str | None) -> Iterator[Line]:
    """Sum a one of each process, on the device and on the host."""
    import torch
    import torch.distributed as dist

    from fmnist.runtime.compute import Compute

    with Compute(device=name, keep_memory=False) as compute:
        size = compute.world_size
        if size == 1:
            yield Line("all-reduce", "ok", "1 process; to check N: torchrun --nproc_per_node N -m fmnist doctor")
            return
        total = int(compute.sum(torch.ones(1, device=compute.device)))
        hosts = compute.gather(platform.node())
        found = f"{dist.get_backend()} over {size} processes on {counted(len(set(hosts)), 'node')}: sum {total}"
        yield Line("all-reduce", "ok" if total == size == len(hosts) else "fail", found)


def check_data(name: str, root: str | None) -> Iterator[Line]:
    """The data set's files: where they are, and of Fashion-MNIST whether they are the published ones."""
    if name != "fashion_mnist":
        from fmnist.config.schema import DataConfig
        from fmnist.data.registry import open_source

        try:
            source = open_source(DataConfig(name=name, root=root, val_size=0))
        except ValueError as error:
            yield Line("data", "fail", one_line(error, 500))
            return
        info = source.info
        counts = f"{info.num_train:,} training images, {len(info.class_names):,} classes"
        yield Line("data", "ok", f"{source.location}: {info.title}, {counts}")
        return
    from fmnist.data.fetch import PUBLISHED, find_file
    from fmnist.data.find import locate
    from fmnist.data.idx import read_idx

    try:
        folder = locate(root)
    except ValueError as error:
        fetched = "only train.py fetches it" in str(error)  # else a folder was named, or holds a part of them
        yield Line("data", "note" if fetched else "fail", "the first run fetches it" if fetched else str(error))
        return
    files = {name: find_file(folder, name) for name in PUBLISHED}
    other = [str(path) for name, path in files.items() if path and read_idx(path)[1] != PUBLISHED[name][1]]
    found = f"not the published files: {', '.join(other)}" if other else "sha256 as published"
    yield Line("data", "note" if other else "ok", f"{folder}: {found}")


def check_weights() -> Iterator[Line]:
    """The cache of pretrained weights."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    names = sorted(path.name.split("--")[-1] for path in cache.glob("models--timm--*"))
    found = f"{cache}: {len(names)} timm models" + (f" ({', '.join(names[:3])}, ...)" if names else "")
    missing = "" if names else "; model.pretrained fetches them, which needs a network"
    yield Line("weights", "ok" if names else "note", found + missing)


def check_tracking() -> Iterator[Line]:
    """What --log.wandb auto would do."""
    from fmnist.tracking.wandb_run import has_api_key

    if importlib.util.find_spec("wandb") is None:
        yield Line("wandb", "note", "not installed: runs log to metrics.jsonl alone")
    elif mode := ENVIRONMENT.get("WANDB_MODE"):
        yield Line("wandb", "ok", f"WANDB_MODE={mode}")
    elif has_api_key():
        yield Line("wandb", "ok", "an API key is configured: --log.wandb auto is online")
    else:
        yield Line("wandb", "note", "no API key: --log.wandb auto is offline; wandb login makes it online")


def check_slurm() -> Iterator[Line]:
    """Whether jobs can be submitted, and whether this one's signals reach the run."""
    from fmnist.runtime.launcher import signal_warning

    if warning := signal_warning():
        yield Line("slurm", "note", warning)
    elif job := ENVIRONMENT.get("SLURM_JOB_ID"):
        yield Line("slurm", "ok", f"job {job}, nodes: {ENVIRONMENT.get('SLURM_JOB_NUM_NODES', '1')}")
    else:
        found = "sbatch found: sbatch slurm/train.sbatch" if shutil.which("sbatch") else "none here; not needed"
        yield Line("slurm", "ok", found)


def check_disk(output: Path) -> Iterator[Line]:
    """Whether runs can be written where they go."""
    folder = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    with tempfile.TemporaryFile(dir=folder):  # an OSError says why it cannot be written
        pass
    enough = "" if free >= MIN_FREE_BYTES else f": free {MIN_FREE_BYTES / 1e9:.0f} GB or choose another --output_dir"
    yield Line("disk", "fail" if enough else "ok", f"{free / 1e9:.1f} GB free in {folder}{enough}")


def main(argv: list[str] | None = None) -> int:
    """Print all lines; return 1 where one of them is a fail."""
    args = PARSER.parse_args(argv)
    log_to_console()
    checks: dict[str, tuple[Callable[..., Iterator[Line]], tuple[Any, ...]]] = {
        "software": (check_software, ()),
        "device": (check_device, (args.device,)),
        "all-reduce": (check_all_reduce, (args.device,)),
        "data": (check_data, (args.data, args.root)),
        "weights": (check_weights, ()),
        "wandb": (check_tracking, ()),
        "slurm": (check_slurm, ()),
        "disk": (check_disk, (args.output,)),
    }
    lines: list[Line] = []
    with one_line_errors(PARSER.prog):
        for name, (check, values) in checks.items():
            try:
                found = list(check(*values))
            except Exception as error:  # whatever a broken installation raises is the answer
                found = [Line(name, "fail", one_line(error))]
            lines += found
            if not (args.json or is_sibling()):
                for line in found:
                    print(f"{line.name:<11} {line.state:<5} {line.text}", flush=True)
    if args.json and not is_sibling():
        print(json.dumps({line.name: {"state": line.state, "text": line.text} for line in lines}))
    return int(any(line.state == "fail" for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
