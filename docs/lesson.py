# %% [markdown]
# # A lesson: from images to a trusted model
#
# You look at the data, train on it, kill the training, resume it and compare the bits, read what the model confuses,
# and find images whose label is wrong. It takes a few minutes on two CPU cores: `python docs/lesson.py`, which leaves
# its pictures in runs/lesson, or docs/lesson.ipynb cell by cell. Page and notebook are made from this file by
# `python -m experiments.lesson_pages`.

# %% [markdown]
# ## See the data
#
# A split is one uint8 tensor on the device: [N, 28, 28], light on black, with a label for each image.

# %%
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

if Path.cwd().name == "docs":
    os.chdir("..")
sys.path.insert(0, os.getcwd())  # the checkout, where fmnist is not installed

import fmnist
import fmnist.data

RUNS = Path("runs/lesson")
shutil.rmtree(RUNS, ignore_errors=True)  # of an earlier lesson
RUNS.mkdir(parents=True)

train = fmnist.data.load("fashion_mnist", "train", device="cpu")
print(train.images.shape, train.images.dtype, len(train.class_names), "classes")
print(torch.bincount(train.labels).tolist(), "images a class")


def show(name, images, titles, columns=8):
    """Draw images [N, H, W] under their titles; save and return the figure, which a notebook shows."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.4 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns).flat:
        axes.set_axis_off()
    for axes, image, title in zip(figure.axes, images, titles, strict=True):
        axes.imshow(image, cmap="gray")
        axes.set_title(title, fontsize=7)
    figure.savefig(RUNS / f"{name}.png")
    print("see", RUNS / f"{name}.png")
    return figure


show("data", train.images[:16], [train.class_names[label] for label in train.labels[:16]])

# %% [markdown]
# ## See it augmented
#
# Flips, rotations and shifts happen on the device, a batch at a time. Order and random numbers are pure functions of
# (seed, epoch, image): ask twice, and you get the same bits.

# %%
images, labels = next(train.batches(16, seed=0, epoch=0, flip=0.5, rotation=15, shift=0.1))
again, _ = next(train.batches(16, seed=0, epoch=0, flip=0.5, rotation=15, shift=0.1))
assert torch.equal(images, again)
show("augmented", images[:, 0], [train.class_names[label] for label in labels])

# %% [markdown]
# ## Train
#
# `fmnist.train` trains, in this process, what `fmnist train` would on the command line. Options are those of the YAML
# files: a section with its fields, or an option at the root. It says what it is about to do, then a line an epoch.

# %%
options = {"schedule": {"epochs": 4}, "log": {"wandb": "disabled"}}
run = fmnist.train("configs/mlp.yaml", output_dir=str(RUNS / "whole"), **options)
test = run.evaluate("test")
print(f"{100 * test['top1']:.1f} % of {test['num_images']:,} test images")
assert test["top1"] > 0.85

# %% [markdown]
# ## Kill it, resume it, compare the bits
#
# The same training once more, as a program of its own, and in the middle of it `kill -9`. The same command then resumes
# from the newest checkpoint.

# %%
command = [sys.executable, "-m", "fmnist", "train", "--config", "configs/mlp.yaml", "--schedule.epochs", "4"]
command += ["--log.wandb", "disabled", "--output_dir", str(RUNS / "killed")]
process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
while process.poll() is None and not list((RUNS / "killed").glob("checkpoints/step_*")):
    time.sleep(0.05)
process.kill()
print("killed:", process.wait() == -signal.SIGKILL)

subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
weights = [(RUNS / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
print("the same bits:", weights[0] == weights[1])
assert weights[0] == weights[1]

# %% [markdown]
# ## Read what it confuses
#
# Each run directory holds a report. Here are the five confusions that cost most; `python -m fmnist evaluate RUN` writes
# report.html, with pictures.

# %%
confusion = torch.tensor(test["confusion_matrix"])
errors = confusion - confusion.diag().diag()
for position in errors.flatten().topk(5).indices.tolist():
    label, prediction = divmod(position, len(train.class_names))
    names = train.class_names[label], train.class_names[prediction]
    print(f"{names[0]} taken for {names[1]}: {errors[label, prediction]} of {confusion[label].sum()}")

# %% [markdown]
# ## Find a wrong label
#
# Rank all training images by the probability that the model gives to their own label. The model has seen eleven of
# twelve of these labels (the others were held out), and still does not believe them: the first ones are worth a look.
# Some are hard, some are plainly wrong.

# %%
logits, _ = run.trained(train.images)
own = logits.softmax(1)[torch.arange(len(train)), train.labels]
suspects = own.argsort()[:16]
titles = [
    f"{index}: {train.class_names[train.labels[index]]}\nor {train.class_names[logits[index].argmax()]}?"
    for index in suspects.tolist()
]
print("\n".join(title.replace("\n", ", ") for title in titles[:5]))
show("suspects", train.images[suspects], titles)

# %% [markdown]
# ## Use it
#
# `predict` takes paths, PIL pictures, or uint8 arrays [N, 28, 28], light on black. A run is its directory: open it
# anywhere, any time.

# %%
images = fmnist.data.load("fashion_mnist", "test", device="cpu").images
answers = fmnist.open_run(RUNS / "whole").predict(images[:2], top=2)
for answer in answers:
    print(", ".join(f"{name} {100 * probability:.1f} %" for name, probability in answer))
