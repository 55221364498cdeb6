"""The calibration error of `fmnist predict` and of the exported graph, before and after the temperature: docs/serve.md.

example: python -m experiments.calibration_rates runs/cnn
"""

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from experiments.markdown import markdown_table
from fmnist.apps.export.__main__ import main as export
from fmnist.apps.predict.__main__ import main as predict
from fmnist.data.fashion_mnist import CLASS_NAMES, load_split

NUM_IMAGES, NUM_BINS = 1000, 15


def error_of(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Return the expected calibration error of N confidences, 0 to 1: the bins' gaps, weighted by their images."""
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    gaps = [abs(correct[bins == one].mean() - confidence[bins == one].mean()) for one in np.unique(bins)]
    return float(np.average(gaps, weights=np.unique(bins, return_counts=True)[1]))


def by_predict(run: str, folder: Path, names: list[str], *more: str) -> tuple[NDArray[np.float64], list[str]]:
    """Return the confidences and classes that `fmnist predict` writes for the pictures of a folder."""
    output = folder / "-".join(("predictions", *more))
    predict([run, str(folder / "pictures"), "--output", str(output), "--sheet", "0", *more])
    rows = {Path(row["file"]).name: row for row in csv.DictReader((output / "predictions.csv").open())}
    return np.array([float(rows[name]["confidence"]) for name in names]), [rows[name]["prediction"] for name in names]


def rows(run: str, num_images: int = NUM_IMAGES) -> list[tuple[str, float, float]]:
    """Return the calibration error before and after the temperature, by program."""
    images, labels = (part[:num_images] for part in load_split("test", None, 0))
    truth = [CLASS_NAMES[label] for label in labels]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        names = [f"{index:05d}.png" for index in range(num_images)]
        for image, file in zip(images.numpy(), names, strict=True):
            Image.fromarray(image).save(folder / "pictures" / file)
        found = []
        for more in (["--no-calibrate"], []):
            confidence, classes = by_predict(run, folder, names, *more)
            found.append(error_of(confidence, np.array(classes) == np.array(truth)))
        export([run, "--to", "onnx", "--output", str(folder / "model.onnx")])
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    logits, calibrated = session.run(None, {"images": images.numpy()})
    exponents = np.exp(logits.astype(float) - logits.max(axis=1, keepdims=True))
    both = exponents / exponents.sum(axis=1, keepdims=True), calibrated.astype(float)
    graph = [error_of(p.max(axis=1), p.argmax(axis=1) == labels.numpy()) for p in both]
    return [("`fmnist predict`", found[0], found[1]), ("ONNX graph, onnxruntime", graph[0], graph[1])]


def table(run: str) -> str:
    """Return the table of the page."""
    shown = [(name, f"{100 * before:.2f} %", f"{100 * after:.2f} %") for name, before, after in rows(run)]
    return markdown_table(("", "without the temperature", "with it"), shown)


if __name__ == "__main__":
    print(table(sys.argv[1]))
