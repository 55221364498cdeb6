"""The micro-batch that fits: found by trial, agreed, kept; memory that runs out is one line with what would do.

A model that raises torch.OutOfMemoryError above a size stands in for a GPU that is full.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from conftest import warm_train as train
from small import refused
from torch import Tensor, nn

import fmnist
from fmnist.checkpoint.contents import MODEL, TrainState, read_state
from fmnist.config.schema import AugmentConfig, Config
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.split import Split
from fmnist.models import REGISTRY
from fmnist.models.cnn import Cnn
from fmnist.runtime.hardware import is_out_of_memory
from fmnist.runtime.processes import Processes
from fmnist.training import budget
from fmnist.training.memory import activation_bytes
from fmnist.training.micro_batch import (
    choose_micro_batch,
    fitting_micro_batch,
    largest_that_fits,
    micro_batch_sizes,
    say_what_would_fit,
)


class Full(Cnn):
    """A CNN on a device that holds so many images."""

    limit = 8
    asked: list[int] = []  # noqa: RUF012 - of the class on purpose

    def __init__(self, num_classes: int, drop_rate: float = 0.5) -> None:
        super().__init__(num_classes, drop_rate=drop_rate, widths=(4, 8))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            Full.asked.append(len(images))
            if len(images) > Full.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> type[Full]:
    monkeypatch.setattr(Full, "limit", 8)
    monkeypatch.setattr(Full, "asked", [])
    monkeypatch.setitem(REGISTRY, "full", Full)
    return Full


def parts(split: Split, **kinds: Any) -> tuple[nn.Module, torch.optim.Optimizer, Augment, Loader]:
    torch.manual_seed(0)
    model = Full(10).train()
    augment = Augment(AugmentConfig(size={0: 20, 3: 28}), num_classes=10, mean=(0.286,), std=(0.353,))
    loader = Loader(split, **{"global_batch_size": 96, "seed": 0} | kinds)
    return model, torch.optim.AdamW(model.parameters()), augment, loader


@pytest.mark.parametrize("sizes", [[1], [2, 4, 8, 16, 32], [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96], [2, 97], [7]])
def test_the_largest_size_that_fits_is_found_with_few_trials(sizes: list[int]) -> None:
    for limit in range(100):
        asked: list[int] = []

        def fits(size: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(size)
            return size <= limit

        assert largest_that_fits(sizes, fits) == max((size for size in sizes if size <= limit), default=None)
        assert len(set(asked)) == len(asked) <= 8
        # Nothing is tried that is more than twice what is known to fit, but for the next size there is.
        for position, size in enumerate(asked[1:], start=1):
            known = max((one for one in asked[:position] if one <= limit), default=sizes[0])
            assert (
                size <= 2 * known
                or size == min(one for one in sizes if one > known or one == sizes[-1])
                or (size == next((one for one in sizes if one >= 2 * known), sizes[-1]))
            )


def test_sizes_cut_the_global_batch_evenly(train_images: Split) -> None:
    def sizes(batch: int, world: int, below: int | None = None) -> list[int]:
        return micro_batch_sizes(Loader(train_images, global_batch_size=batch, seed=0, world_size=world), below)

    assert sizes(96, 1) == [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
    assert sizes(96, 4) == [2, 3, 4, 6, 8, 12, 24]
    assert sizes(7, 1) == [7] and sizes(4, 4) == [1]  # one image only where nothing else is left
    assert sizes(96, 1, below=8) == [2, 3, 4, 6] and sizes(96, 1, below=2) == [1]


@pytest.mark.parametrize(("limit", "found"), [(1, None), (2, 2), (7, 6), (8, 8), (31, 24), (1000, 96)])
def test_a_trial_changes_nothing_of_the_model(
    limit: int, found: int | None, train_images: Split, full: type[Full]
) -> None:
    full.limit = limit
    model, optimizer, augment, loader = parts(train_images)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = micro_batch_sizes(loader)
    assert fitting_micro_batch(model, optimizer, augment, loader, sizes) == found
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training and not optimizer.state


def test_it_is_tried_at_the_largest_image_size(train_images: Split, full: type[Full]) -> None:
    model, optimizer, augment, loader = parts(train_images)
    seen: list[int] = []
    model.stem.register_forward_pre_hook(lambda _, operands: seen.append(operands[0].shape[-1]))
    fitting_micro_batch(model, optimizer, augment, loader, [2, 4])
    assert seen == [28, 28]


def test_the_gradients_of_the_micro_batches_before_need_room_too(
    train_images: Split, full: type[Full], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the whole batch at once are added to gradients that are there already."""
    Full.limit = 64
    model = full(10)
    weights, room, empty = 4 * sum(p.numel() for p in model.parameters()), list[int](), torch.empty

    def asked(*size: Any, **more: Any) -> Tensor:
        room.extend([int(size[0])] * (more.get("dtype") is torch.uint8 and len(size) == 1))
        return empty(*size, **more)

    monkeypatch.setattr("fmnist.training.micro_batch.torch.empty", asked)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.1), Loader(train_images, global_batch_size=64, seed=0)
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    assert fitting_micro_batch(model, optimizer, augment, loader, [32, 64]) == 64
    assert room == [weights, 0]


def test_another_error_is_not_taken_for_a_full_memory(train_images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model, optimizer, augment, loader = parts(train_images)
    monkeypatch.setattr(Full, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        fitting_micro_batch(model, optimizer, augment, loader, [2])
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_processes_agree_on_what_fits_all_of_them(train_images: Split, full: type[Full]) -> None:
    class Two(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, 4]

    one, two, parted = Processes(0, 1), Two(0, 1), parts(train_images)
    assert choose_micro_batch(*parted, None, one) == 8
    assert choose_micro_batch(*parted, None, two) == 4
    full.asked.clear()
    assert choose_micro_batch(*parted, 12, one) == 12 and not full.asked  # of an earlier start: no trial
    assert choose_micro_batch(*parted, 5, one) == 8  # of another process count, which does not cut the batch here
    full.limit = 1
    with pytest.raises(ValueError, match="micro_batch_size is auto, but not even 2 images of 28 px fit into memory"):
        choose_micro_batch(*parted, None, one)


def training_of(split: Split, micro: int) -> Any:
    model, optimizer, augment, loader = parts(split, micro_batch_size=micro)
    return SimpleNamespace(
        model=model, optimizer=optimizer, augment=augment, loader=loader, state=TrainState(step=4, best_step=4)
    )


def test_memory_that_runs_out_is_one_line_with_the_size_that_would_do(train_images: Split, full: type[Full]) -> None:
    def ended(micro: int, cfg: Config, action: Callable[[Any], Any]) -> str:
        training = training_of(train_images, micro)
        with pytest.raises(ValueError) as caught, say_what_would_fit(training, cfg):
            action(training)
        assert "\n" not in str(caught.value) and caught.value.__cause__ is None
        return str(caught.value)

    def forward(training: Any) -> None:
        training.model(torch.zeros(training.loader.micro_batch_size, 1, 28, 28))

    def predict(training: Any) -> None:  # as metrics.predict is called
        forward(training)

    assert ended(96, Config(), forward) == (
        "out of memory at step 5 with micro-batches of 96 images; 8 fit: --batch.micro_batch_size 8 resumes it, with "
        "the same batches"
    )
    assert "evaluation.batch_size is 500; valid: a smaller one, such as --evaluation.batch_size 250" in ended(
        96, Config(), predict
    )
    assert "which exact 4 makes; valid: a larger --exact" in ended(24, replace(Config(), exact=4), forward)
    full.limit = 0
    assert "and no smaller one fits; valid: a smaller model or augment.size" in ended(2, Config(), forward)
    training = training_of(train_images, 8)
    with pytest.raises(RuntimeError, match="something else"), say_what_would_fit(training, Config()):
        raise RuntimeError("something else")


def test_activations_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,))
    # Of an image: its 784 pixels, 100 units (once, though both neighbours keep them), 10 logits and their logsumexp.
    assert activation_bytes(model, augment, 28, 2) == 2 * 4 * (784 + 100 + 10 + 1)
    assert activation_bytes(model, augment, 28, 128) == 128 * 4 * 895


def test_the_estimate_changes_nothing_and_counts_what_is_not_of_an_image_once() -> None:
    torch.manual_seed(0)
    model = Cnn(10, widths=(8, 16)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    augment = Augment(AugmentConfig(), num_classes=10, mean=(0.286,), std=(0.353,), dtype=torch.bfloat16)
    small, large = (activation_bytes(model, augment, 28, count) for count in (10, 1010))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    # bfloat16 copies of the weights are kept once: the estimate is no multiple of one image's.
    each = (large - small) / 1000
    assert 0 < small - 10 * each < 4 * sum(tensor.numel() for tensor in before.values()) * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch.micro_batch_size", "automatic"], "batch.micro_batch_size is 'automatic'; expected int|auto|null"),
        (["--batch.micro_batch_size", "0"], "batch.micro_batch_size is 0; valid range: 1 to 60000"),
        (["--batch.micro_batch_size", "auto", "--exact", "4"], "batch.micro_batch_size is auto, but exact makes it"),
    ],
)
def test_a_wrong_option_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *flags)


LAST = "checkpoints/step_00000004"


def go(run: Path, data: Path, micro: int | str, **schedule: Any) -> Path:
    fmnist.train(
        "configs/mlp.yaml",
        output_dir=str(run),
        model={"name": "full", "options": {}, "precision": "fp32"},
        data={"root": str(data), "val_size": 500},
        batch={"global_batch_size": 32, "micro_batch_size": micro},
        schedule={"warmup_epochs": 0.0} | (schedule or {"steps": 4}),
        evaluation={"every_steps": 2, "test": False},
        checkpoint={"every_steps": 1, "keep_last": 4},
        log={"every_steps": 1, "wandb": "disabled"},
    )
    return run


@pytest.mark.thorough
def test_auto_is_a_run_of_the_size_it_found_and_keeps_it(data: Path, tmp_path: Path, full: type[Full]) -> None:
    auto, plain = go(tmp_path / "auto", data, "auto"), go(tmp_path / "plain", data, 8)
    assert (auto / LAST / MODEL).read_bytes() == (plain / LAST / MODEL).read_bytes()
    assert read_state(auto / LAST).micro_batch_size == 8 and read_state(plain / LAST).micro_batch_size is None
    for name in ("summary.json", MODEL, "checkpoints/step_00000003", LAST):
        path = auto / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    full.limit = 16  # another device: the run keeps its size, and so its bits
    go(auto, data, "auto")
    assert (auto / LAST / MODEL).read_bytes() == (plain / LAST / MODEL).read_bytes()
    full.limit = 8
    with pytest.raises(ValueError, match="out of memory at step 1 with micro-batches of 32 images; 8 fit: --batch.mic"):
        go(tmp_path / "large", data, 32)


@pytest.mark.thorough
def test_a_run_of_minutes_searches_once(
    data: Path, tmp_path: Path, full: type[Full], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "largest_within", lambda *_: 4)  # whatever the real clock says
    timed = go(tmp_path / "timed", data, "auto", minutes=5)
    assert full.asked.count(16) == 1  # which does not fit, so that nothing but a search asks for it
    plain = go(tmp_path / "plain", data, 8)
    assert (timed / LAST / MODEL).read_bytes() == (plain / LAST / MODEL).read_bytes()
    state = read_state(timed / LAST)
    assert (state.micro_batch_size, state.total_steps) == (8, 4)
    # Resumed, it neither searches nor times anything: the checkpoint says both.
    full.asked.clear()
    for path in (timed / "summary.json", timed / MODEL):
        path.unlink()
    shutil.rmtree(timed / LAST)
    go(timed, data, "auto", minutes=5)
    assert full.asked == [8, 8, 8, 8]  # the last step
    assert replace(read_state(timed / LAST), train_seconds=state.train_seconds) == state


@pytest.mark.thorough
def test_two_processes_agree_and_a_plan_names_the_activations(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from fmnist.models import REGISTRY\n"
        "from test_micro_batch import Full\n"
        "REGISTRY['full'] = Full\n"
        "Full.limit = 8 if os.environ.get('RANK') == '1' else 16\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    flags = (
        "--config",
        ROOT / "configs/mlp.yaml",
        "--model.name",
        "full",
        "--model.options",
        "{}",
        "--batch.global_batch_size",
        64,
    )
    flags += ("--batch.micro_batch_size", "auto", "--schedule.steps", 2, "--schedule.warmup_epochs", 0)
    flags += ("--evaluation.test", "false", "--log.wandb", "disabled", "--data.limit", 640)
    run = tmp_path / "run"
    train(*flags, "--output_dir", run, script=script, processes=2)
    state = json.loads((run / "checkpoints/step_00000002/state.json").read_text())
    assert state["micro_batch_size"] == 8
    plan = train(*flags, "--output_dir", tmp_path / "plan", "--dry_run", script=script).stdout
    assert "64 = 16 images x 1 process x 4 accumulation steps" in plan
    assert "MiB of activations for 16 images of 28 px" in plan
