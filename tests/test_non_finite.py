"""NaN and infinity, from thirteen places: all processes stop at one step, nothing broken is saved, a picture is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from conftest import warm_train as train
from matplotlib.image import imread
from safetensors.torch import load_file

from fmnist.config.schema import AugmentConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.data.split import Split
from fmnist.runtime.processes import Processes
from fmnist.training.batch_pictures import title, visible, write_batch
from fmnist.training.non_finite import NonFiniteWatch

# Kind: the step at which it is noticed where every step is logged and saved, and a word of the message.
AT_ONCE = {
    "loss_nan": "loss is nan",
    "loss_inf": "loss is inf",
    "logits": "loss is nan",
    "one_gradient": "grad_norm is nan",
}
AT_ONCE |= {
    "loss_of_one_rank": "loss is nan",
    "weight": "loss is nan",
    "normalization": "loss is nan",
    "pixel": "loss is nan",
}
AT_THE_SAVE = {
    "weight_after_the_log": "model.safetensors: head.weight",
    "ema": "ema.safetensors: head.bias",
    "moment": "optimizer.safetensors: exp_avg/head.weight",
    "statistic": "running_var",
    "learning_rate": "model.safetensors: ",
}
KINDS = AT_ONCE | AT_THE_SAVE
STEP = 7


def inject(kinds: list[str], tmp_path: Path, config: Path, *more: object, processes: int) -> str:
    flags = ["--config", config, "--output_dir", tmp_path / "runs", "--batch.micro_batch_size", 16, *more]
    done = train(",".join(kinds), *flags, processes=processes, script=ROOT / "tests/inject.py")
    return done.stderr


def check(run: Path, processes: int, noticed: int, begun: int, message: str, err: str) -> None:
    reports: list[dict[str, Any]] = [json.loads((run / f"rank_{r}.json").read_text()) for r in range(processes)]
    assert reports == [{"status": 1, "step": noticed}] * processes  # all at the same step
    lines = [line for line in err.splitlines() if "train.py: error" in line and f"/{run.name}/" in line]
    assert len(lines) == 1, err
    assert message in lines[0] and f"at step {noticed}" in lines[0]
    picture = run / f"non_finite_step_{begun:08d}.png"
    assert str(picture) in lines[0]
    assert imread(picture).std() > 0.01
    saved = sorted(run.glob("checkpoints/step_*"))
    assert saved and all(int(path.name[5:]) < noticed for path in saved)
    files = [*run.glob("checkpoints/*/*.safetensors"), *run.glob("*.safetensors")]
    assert len(files) >= 3
    for path in files:
        for name, tensor in load_file(path).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), (path, name)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= noticed


@pytest.mark.thorough
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_thirteen_injections_stop_all_processes_at_one_step_and_nothing_broken_is_saved(
    processes: int, tmp_path: Path, small_config: Path
) -> None:
    err = inject(list(KINDS), tmp_path, small_config, processes=processes)
    for kind, message in KINDS.items():
        check(tmp_path / "runs" / kind, processes, STEP, STEP, message, err)
    if processes == 2:
        one = next(line for line in err.splitlines() if "train.py: error" in line and "/loss_of_one_rank/" in line)
        assert "(the loss of rank 1)" in one


@pytest.mark.thorough
def test_between_two_logged_lines_it_is_noticed_at_the_save_or_the_line_and_traced_to_its_step(
    tmp_path: Path, small_config: Path
) -> None:
    kinds = ["loss_nan", "moment"]
    late = ["--log.every_steps", 10, "--checkpoint.every_steps", 3, "--evaluation.every_steps", 100]
    err = inject(kinds, tmp_path, small_config, *late, processes=1)
    check(tmp_path / "runs/loss_nan", 1, 9, 7, "not finite, so nothing is saved, at step 9, first at step 7", err)
    # The moment broke after step 7: the weights with it in step 8, whose loss is that of step 9.
    check(tmp_path / "runs/moment", 1, 9, 9, "not finite, so nothing is saved, at step 9", err)


def test_the_window_remembers_the_first_bad_step_and_nothing_older(train_images: Split, tmp_path: Path) -> None:
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    loader = Loader(train_images, global_batch_size=64, seed=0)
    watch = NonFiniteWatch(Processes(0, 1), loader, augment, tmp_path, every_steps=4)
    for step in range(1, 11):
        loss, norm = (float("nan") if step == bad else 1.0 for bad in (9, 8))
        watch.note({"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}, step)
        assert watch.first(step) == (None if step < 8 else (8, False))
    for step in range(11, 14):
        watch.note({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)}, step)
    assert watch.first(13) is None  # steps 10 to 13: those before were looked at in their time


def test_a_checkpoint_from_before_is_named_only_where_there_is_one(train_images: Split, tmp_path: Path) -> None:
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    loader = Loader(train_images, global_batch_size=64, seed=0)
    watch = NonFiniteWatch(Processes(0, 1), loader, augment, tmp_path, every_steps=4)
    with pytest.raises(
        FloatingPointError, match=r"^loss is nan at step 2; .*00000002\.png; no checkpoint was saved yet$"
    ):
        watch.check({"loss": float("nan")}, 2)
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    with pytest.raises(FloatingPointError, match=r"\.png; the last checkpoint is from before$"):
        watch.check({"loss": float("nan")}, 2)


def test_the_picture_is_the_whole_global_batch_as_the_processes_saw_it(
    train_images: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = Augment(
        AugmentConfig(rotation=10, mixup_alpha=0.4, cutmix_alpha=1.0), num_classes=10, mean=(0.286,), std=(0.353,)
    )
    loaders = [
        Loader(train_images, global_batch_size=64, micro_batch_size=16, seed=5, rank=rank, world_size=2)
        for rank in range(2)
    ]
    parts = [[augment(batch) for batch in loader.micro_batches(11)] for loader in loaders]
    seen = [parts[rank][accumulation] for accumulation in range(2) for rank in range(2)]  # in the global batch's order
    drawn: list[Any] = []
    monkeypatch.setattr("fmnist.report.grid.draw_grid", lambda _path, *drawing: drawn.append(drawing[:2]))
    write_batch(tmp_path / "x.png", loaders[1].for_main(11), augment, 12)
    images, titles = drawn[0]
    expected = torch.cat([visible(pixels, augment) for pixels, _ in seen]).clamp(0, 1)
    assert torch.equal(images, expected)
    assert images.shape == (64, 28, 28, 3)
    targets = torch.cat([target for _, target in seen])
    assert titles == [title(target, CLASS_NAMES) for target in targets]
    own = CLASS_NAMES[int(targets[0].argmax())]
    assert own in titles[0]


def test_pixels_that_are_not_finite_are_red_and_shown_first(
    train_images: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = Augment(AugmentConfig(flip=0.0), num_classes=10, mean=(0.286,), std=(0.353,))
    loader = Loader(train_images, global_batch_size=512, seed=0)
    real = augment._make

    def broken(*args: Any) -> torch.Tensor:
        images = real(*args)
        images[500, 0, 3, 4] = float("inf")
        return images

    augment._make = broken
    drawn: list[Any] = []
    monkeypatch.setattr("fmnist.report.grid.draw_grid", lambda _path, *drawing: drawn.append(drawing[:2]))
    write_batch(tmp_path / "x.png", loader.for_main(0), augment, 1)
    images, titles = drawn[0]
    assert len(images) == len(titles) == 256  # half of the batch, the broken one among them
    assert images[0, 3, 4].tolist() == [1.0, 0.0, 0.0]
    index = int(loader.micro_batches(0)[0].indices[500])
    assert titles[0] == CLASS_NAMES[int(train_images.labels[index])]
    grey = images[0].clone()
    grey[3, 4] = train_images.images[index, 3, 4] / 255
    assert torch.allclose(grey[..., 0], train_images.images[index] / 255, atol=1e-6)
