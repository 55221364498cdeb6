"""Race saves beside the steps against saves that are waited for: python -m experiments.save_speed [--rounds 3]

ConvNeXt-Tiny by Muon with a moving average (335 MB a checkpoint) at 32 px, 40 steps of 32 images and a checkpoint after
every tenth. Interleaved: each round trains once either way, by train.py; medians of the rounds.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fmnist.runtime.files import read_json, write_json
from fmnist.runtime.provenance import measured_now

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [
    *("--model.name", "convnext_tiny", "--augment.size", "32", "--model.depthwise", "conv", "--optim.ema_decay", "0.9"),
    *("--data.limit", "640", "--data.val_size", "100", "--batch.global_batch_size", "32", "--schedule.steps", "40"),
    *("--schedule.warmup_epochs", "0", "--evaluation.every_steps", "40", "--evaluation.test", "false"),
    *("--checkpoint.every_steps", "10", "--checkpoint.keep_last", "1", "--log.wandb", "disabled"),
]
# The same program, but that each save is on the disk before the next step begins.
WAITED = """
import runpy, sys
from fmnist.runtime.background import Background
start = Background.start
Background.start = lambda self, *work: (start(self, *work), self.join())
runpy.run_path("train.py", run_name="__main__")
"""
PROGRAMS = {"waited for": ["-c", WAITED], "beside the steps": ["train.py"]}
NUMBERS = ("save_seconds", "share_outside_steps", "train_seconds", "images_per_second_overall")


def train(program: list[str], options: list[str], directory: Path) -> dict[str, Any]:
    """Train once and return the numbers of its summary, and the bytes of its last checkpoint."""
    command = [sys.executable, *program, *options, "--output_dir", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    summary = read_json(directory / "summary.json")
    (last,) = (directory / "checkpoints").glob("step_*")
    found = {name: summary[name] for name in NUMBERS}
    return found | {"checkpoint_bytes": sum(file.stat().st_size for file in last.iterdir())}


def main() -> None:
    """Race, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "experiments/results/save_speed.json")
    args, more = parser.parse_known_args()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name, program in PROGRAMS.items():
                found = train(program, [*OPTIONS, *more], Path(folder) / f"{name}_{number}".replace(" ", "_"))
                rounds[name].append(found)
                print(name, found, flush=True)
    medians = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in rounds.items()
    }
    command = " ".join(["python -m experiments.save_speed", *sys.argv[1:]])
    write_json(args.output, {"command": command, **measured_now(), "medians": medians, "rounds": rounds})


if __name__ == "__main__":
    main()
