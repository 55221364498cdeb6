"""Race `fmnist predict` against timm's inference script on 2,000 photographs of clothes, as whole programs.

    accelerate launch train.py --config configs/efficientnet_lite0.yaml
    python -m experiments.predict_speed race runs/efficientnet_lite0

timm's `inference.py` is not in its wheel: `timm` here does the same with timm's own data set, transforms, loader (two
workers) and model, at the run's image size, and writes the same kind of CSV. Both programs take turns; from the
smallest time of each at two numbers of pictures follow the time per picture and the time of the start. The processors'
time of all their processes stands beside it: it says something on a machine that others use, too.
The photographs are test images, enlarged to most of 480 px, coloured, on plain lit backgrounds with a camera's noise.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fmnist.config.parse import load_config
from fmnist.data.fashion_mnist import load
from fmnist.runtime.files import write_json
from fmnist.runtime.provenance import measured_now

SIDE, BATCH_SIZE = 480, 64
OUTPUT = Path(__file__).parent / "results" / "predict_speed.json"


def photograph(image: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Enlarge a 28 x 28 image, light on black, and lay it on a plain background: 480 x 480 RGB."""
    side, light = int(rng.integers(300, 420)), rng.random() < 0.7
    shape = Image.fromarray(((image > 12) * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    alpha = np.asarray(shape, dtype=np.float32)[..., None] / 255
    big = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    shade = 0.9 * big[..., None] / 255
    ink = 255 * (1 - shade if light else 0.1 + shade) * rng.uniform(0.75, 1, 3).astype(np.float32)
    paper = rng.uniform(190, 255, 3) if light else rng.uniform(5, 60, 3)
    scene = np.broadcast_to(paper.astype(np.float32), (SIDE, SIDE, 3)).copy()
    top, left = (int(edge) for edge in rng.integers(20, SIDE - 20 - side, 2))
    place = np.s_[top : top + side, left : left + side]
    scene[place] = alpha * ink + (1 - alpha) * scene[place]
    scene *= np.linspace(*rng.uniform(0.94, 1.04, 2), SIDE, dtype=np.float32)[None, :, None]
    scene += rng.normal(0, rng.uniform(1, 4), scene.shape).astype(np.float32)
    return Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))


def draw(folder: Path, number: int) -> None:
    """Write the first test images as JPEG."""
    folder.mkdir(parents=True)
    for index, image in enumerate(load("test")[0][:number].numpy()):
        rng = np.random.default_rng(index)
        photograph(image, rng).save(folder / f"{index:05}.jpg", quality=int(rng.integers(82, 94)))


def predict_as_timm(folder: Path, model_name: str, size: int) -> None:
    """Do what timm's inference.py does with a folder: the weights, which do not change the time, are random."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config

    model = timm.create_model(model_name, num_classes=10).eval()
    data = resolve_data_config({"img_size": size}, model=model)
    dataset = create_dataset(root=str(folder), name="", class_map="")
    loader = create_loader(dataset, batch_size=BATCH_SIZE, use_prefetcher=False, num_workers=2, **data)
    rows = []
    with torch.inference_mode():
        for images, _ in loader:
            values, labels = model(images).softmax(-1).topk(3)
            rows += [f"{pair}" for pair in zip(labels.tolist(), values.tolist(), strict=True)]
    names = dataset.filenames(basename=True)
    text = "".join(f"{name},{row}\n" for name, row in zip(names, rows, strict=True))
    Path(folder.parent, "timm.csv").write_text(text)


def cpu_seconds() -> float:
    """Return what all programs that have ended used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def race(run: Path, numbers: tuple[int, int], repeats: int) -> None:
    """Time both programs in turn and write the result."""
    cfg = load_config(run / "config.yaml")
    size = cfg.augment.size if isinstance(cfg.augment.size, int) else max(cfg.augment.size.values())
    with tempfile.TemporaryDirectory() as place:
        folders = {number: Path(place, str(number)) for number in numbers}
        for number, folder in folders.items():
            draw(folder / "photos", number)
        programs = {
            "fmnist": lambda folder: ["fmnist", "predict", run, folder / "photos", "--output", folder / "predictions"],
            "timm": lambda folder: ["experiments.predict_speed", "timm", folder / "photos", cfg.model.name, size],
        }
        seconds: dict[str, dict[int, list[float]]] = {name: {number: [] for number in numbers} for name in programs}
        cpu: dict[str, dict[int, list[float]]] = {name: {number: [] for number in numbers} for name in programs}
        for repeat in range(repeats + 1):
            for number, folder in folders.items():
                for name, program in programs.items():
                    command = [sys.executable, "-m", *map(str, program(folder))]
                    start, cpu_before = time.perf_counter(), cpu_seconds()
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=OUTPUT.parents[2])
                    if repeat:  # the first computes the run's features of the training images, once
                        seconds[name][number].append(round(time.perf_counter() - start, 2))
                        cpu[name][number].append(round(cpu_seconds() - cpu_before, 2))
    few, many = numbers
    result: dict[str, object] = {
        "model": f"{cfg.model.name}, {size} px, batch {BATCH_SIZE}",
        "command": "python -m experiments.predict_speed race RUN",
        **measured_now(device="CPU"),
        "load": os.getloadavg()[1],  # of five minutes: a quiet machine has that of the race alone
        "seconds": seconds,
        "cpu_seconds": cpu,
    }
    for name, times in seconds.items():
        per_picture = (min(times[many]) - min(times[few])) / (many - few)
        start_s = min(times[few]) - few * per_picture
        busy = (min(cpu[name][many]) - min(cpu[name][few])) / (many - few)
        result[name] = {
            "ms_per_picture": round(1000 * per_picture, 2),
            "cpu_ms_per_picture": round(1000 * busy, 2),
            "start_s": round(start_s, 2),
        }
    write_json(OUTPUT, result)
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    racing = commands.add_parser("race", help="time both")
    racing.add_argument("run", type=Path)
    racing.add_argument("--numbers", type=int, nargs=2, default=(200, 2000), help="pictures, few and many")
    racing.add_argument("--repeats", type=int, default=3)
    timm = commands.add_parser("timm", help="one program of the race")
    timm.add_argument("folder", type=Path)
    timm.add_argument("model")
    timm.add_argument("size", type=int)
    args = parser.parse_args()
    if args.command == "race":
        race(args.run.resolve(), tuple(args.numbers), args.repeats)
    else:
        predict_as_timm(args.folder, args.model, args.size)


if __name__ == "__main__":
    main()
