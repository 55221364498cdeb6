"""What a run holds after its third epoch it holds after its 200th."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, train

LONG_RUN = """
data: {val_size: 58000}
batch: {global_batch_size: 500}
augment: {size: 28, rotation: 10, shift: 0.1, erase: 0.25}
schedule: {epochs: 200}
evaluation: {every_epochs: 50}
checkpoint: {every_steps: 40}
log: {every_steps: 4, wandb: disabled}
"""


def growth(tmp_path: Path, *flags: object, on_cpu: bool) -> float:
    config = tmp_path / "long.yaml"
    config.write_text(LONG_RUN)  # 2,000 images: 4 steps an epoch, one line each
    flags = ("--config", config, "--output_dir", tmp_path / "run", *flags)
    done = train(*flags, script=ROOT / "tests/long_run.py", on_cpu=on_cpu)
    seen = dict(json.loads(done.stdout.splitlines()[-1]))
    assert len(seen) == 200
    first, last = ([seen[float(epoch)] for epoch in epochs] for epochs in (range(3, 23), range(181, 201)))
    return min(last) / min(first) - 1  # the least: the next epoch's table may be there already, or not yet


@pytest.mark.slow
def test_memory_on_the_host_does_not_grow(tmp_path: Path) -> None:
    assert growth(tmp_path, "--model.name", "mlp", on_cpu=True) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_memory_on_the_device_does_not_grow(tmp_path: Path, model: str) -> None:
    assert growth(tmp_path, "--model.name", model, on_cpu=False) < 0.01
