"""`fmnist COMMAND` and `python -m fmnist COMMAND`: one door to everything."""

import sys

from fmnist.runtime.interrupts import end_at_interrupt

# Each is imported, or run, only when it is called.
COMMANDS = {
    "train": ("train.py", "train a model, or resume; the same as train.py"),
    "evaluate": ("evaluate.py", "metrics, figures and a report of finished runs; the same as evaluate.py"),
    "predict": ("fmnist.apps.predict.__main__", "predict your own pictures: a CSV and a sheet"),
    "search": ("fmnist.apps.search.__main__", "find the images that look most like a picture"),
    "monitor": ("fmnist.apps.monitor.__main__", "test a batch of pictures for drift; the exit status says the result"),
    "export": ("fmnist.apps.export.__main__", "write a run as an ONNX graph or as a folder for a model hub"),
    "audit": ("fmnist.apps.audit.__main__", "rank the training images by how likely their labels are wrong"),
    "checkpoint": ("fmnist.apps.checkpoints", "verify the checkpoints of runs"),
    "data": ("fmnist.apps.data.__main__", "look at a data set: counts, copies, and sheets of its images"),
    "duplicates": ("fmnist.apps.duplicates", "list the test images that copy a training image"),
    "benchmark": ("fmnist.benchmark.__main__", "race the data path and the training step against others"),
    "launch": ("fmnist.apps.launch", "check train.py's flags and print the run directory, for batch scripts"),
    "doctor": ("fmnist.apps.doctor", "check what this machine has: devices, data, all-reduce, disk"),
}


def usage() -> str:
    """Return the text of --help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fmnist COMMAND [options]",
            "",
            "commands (fmnist COMMAND --help explains each):",
            *lines,
            "",
            "examples:",
            "  fmnist train --config configs/mlp.yaml --schedule.epochs 2",
            "  torchrun --nproc_per_node 4 -m fmnist train",
            "  fmnist predict runs/mlp photos/",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if argv is None:
        end_at_interrupt()  # without a traceback, until these imports are done
    import importlib
    import runpy

    from fmnist.config.shipped import shipped
    from fmnist.runtime.arguments import nearest
    from fmnist.runtime.console import open_door

    if argv is None:
        argv = sys.argv[1:]
        open_door(" ".join(["fmnist", *argv[:1]]))
    if not argv or argv[0] in ("--help", "-h"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        sys.stderr.write(f"fmnist: error: unknown command {name}{nearest(name, COMMANDS)}; fmnist --help lists all\n")
        return 2
    module = COMMANDS[name][0]
    if module.endswith(".py"):  # the very files of the checkout: the training loop is in one place
        sys.argv = [module, *rest]
        runpy.run_path(str(shipped(module)), run_name="__main__")
        return 0
    return int(importlib.import_module(module).main(rest) or 0)


if __name__ == "__main__":
    raise SystemExit(main())
