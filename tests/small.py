"""Small things that several tests build: part of the real images, a run that was never trained, a command run here."""

import csv
import io
import json
import logging
import shutil
import struct
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fmnist.checkpoint.tensors import apart
from fmnist.config.parse import parse_config
from fmnist.config.schema import AugmentConfig, BatchConfig, Config, DataConfig, ModelConfig, to_yaml
from fmnist.data.fashion_mnist import load, published
from fmnist.data.info import DATA_FILE, DataInfo
from fmnist.models import build_model

NUM_TRAIN, NUM_TEST, VAL_SIZE = 2000, 1100, 500


def write_small_data(folder: Path) -> Path:
    """Write the first images of train and test as a data folder, for $FMNIST_DATA."""
    for split, prefix, count in (("train", "train", NUM_TRAIN), ("test", "t10k", NUM_TEST)):
        images, labels = load(split)  # type: ignore[arg-type]
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images[:count].numpy().tobytes())
        header = struct.pack(">II", 0x801, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels[:count].byte().numpy().tobytes())
    return folder


def untrained(folder: Path, model: ModelConfig, size: int) -> Path:
    """Make a run directory of a model as it was drawn, moved off its first symmetric state."""
    cfg = Config(
        data=DataConfig(val_size=VAL_SIZE),
        batch=BatchConfig(global_batch_size=32),
        model=model,
        augment=AugmentConfig(size=size),
        output_dir=str(folder),
    )
    return keep_untrained(folder, cfg, published(VAL_SIZE), size)


def keep_untrained(folder: Path, cfg: Config, info: DataInfo, size: int) -> Path:
    """Make a run directory of a config's model as it was drawn, moved off its first symmetric state."""
    shape = {"num_classes": len(info.class_names), "mean": info.mean, "std": info.std, "image_size": size}
    torch.manual_seed(0)
    built, _ = build_model(cfg.model, **shape, load_weights=False)  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in (*built.parameters(), *built.buffers()):
            if tensor.is_floating_point():
                tensor += 0.03 * torch.randn_like(tensor)  # norms, running statistics and zero-initialised heads too
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(cfg))
    (folder / DATA_FILE).write_text(json.dumps(info.to_json()))
    save_file(apart(built.state_dict()), folder / "model.safetensors")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Parse flags of train.py that are wrong, and return the one line that says so."""
    with pytest.raises(SystemExit) as caught:
        parse_config(list(argv), prog="train.py")
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("train.py: error: ")
    return err


def kill(run: Path) -> None:
    """Leave of a finished run of 4 steps what kill -9 leaves after step 2."""
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoints/step_{step:08d}")
    for name in ("summary.json", "model.safetensors"):
        (run / name).unlink()


def newest(run: Path) -> Path:
    """Return a run's newest full checkpoint."""
    return max((run / "checkpoints").glob("step_*"))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def command(
    main: Callable[[list[str]], int | None], *args: object, status: int | None = 0, lines: int | None = 1
) -> str:
    """Run a command in this process; return what it printed and, for a mistake, the one line on stderr.

    Args:
        main: takes the arguments.
        args: made into text.
        status: how it has to end; None where that does not matter.
        lines: on stderr after a mistake; None where that does not matter.
    """
    logger = logging.getLogger("fmnist")
    handlers, propagate = list(logger.handlers), logger.propagate
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(arg) for arg in args]) or 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            logger.handlers[:], logger.propagate = handlers, propagate
    assert status is None or code == status, err.getvalue()
    told = [line for line in err.getvalue().splitlines() if "not the published Fashion-MNIST" not in line]
    assert not status or lines is None or len(told) == lines, err.getvalue()
    return out.getvalue() + err.getvalue()
