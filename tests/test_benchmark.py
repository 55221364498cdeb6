"""The benchmark: its gate, what it counts, what it writes. No test here depends on how fast anything is."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, execute
from torch import Tensor

from fmnist import step
from fmnist.benchmark import __main__ as entry
from fmnist.benchmark import operators
from fmnist.benchmark import trainer as trainer_module
from fmnist.benchmark.command_line import LOADERS, parse
from fmnist.benchmark.failures import failure_of
from fmnist.benchmark.gate import CASES, check, expected, transform_error
from fmnist.benchmark.libraries import PIPELINES, V2, PilLoader
from fmnist.benchmark.output import add_ratios, draw, render_profile, render_table, scaled
from fmnist.benchmark.photographs import photographs
from fmnist.benchmark.pipelines import Fixed, Pipeline, Setting
from fmnist.benchmark.timing import ByteCounter, bytes_per_image, race, round_up, summarize
from fmnist.benchmark.trainer import Trainer
from fmnist.config.schema import Config, ModelConfig
from fmnist.data.split import Split
from fmnist.runtime.compute import Compute


@pytest.fixture
def setting(train_images: Split) -> Setting:
    return Setting(split=train_images, size=56, batch_size=32, dtype=torch.float32)


@pytest.fixture
def compute() -> Iterator[Compute]:
    with Compute() as opened:
        yield opened


def build(name: str, setting: Setting) -> Pipeline:
    return PIPELINES[name](name, setting)


# --- the ground truth ---------------------------------------------------------------------------------------------


def test_the_ground_truth_knows_flips_shifts_turns_and_boxes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    exact = images / 255
    same, inside = expected(images, Fixed(), 28, "one warp")
    assert np.allclose(same, exact) and inside.all()
    assert np.allclose(expected(images, Fixed(flip=True), 28, "one warp")[0], exact[:, :, ::-1])
    # A quarter turn counter-clockwise; rot90 turns the first given axis towards the second: rows towards columns.
    assert np.allclose(expected(images, Fixed(angle=90), 28, "one warp")[0], np.rot90(exact, axes=(1, 2)))
    shifted, inside = expected(images, Fixed(shift_x=2, shift_y=-1), 28, "one warp")
    assert np.allclose(shifted[:, :27, 2:], exact[:, 1:, :26])  # right by 2, up by 1
    assert inside[:27, 2:].all() and inside.sum() == 27 * 26
    erased, inside = expected(images, Fixed(box=(0.25, 0.5, 0.75, 0.75)), 28, "one warp")
    assert (erased[:, 14:21, 7:21] == 0.2860).all() and (erased == 0.2860).sum() == 3 * 7 * 14


def test_the_ground_truth_resizes_as_torch_does() -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    right = torch.nn.functional.interpolate(torch.tensor(images)[:, None].double() / 255, (56, 56), mode="bilinear")
    for chain in ("one warp", "warp, then resize", "resize, then warp"):
        result, inside = expected(images, Fixed(), 56, chain)
        assert np.abs(result - right[:, 0].numpy())[:, inside].max() < 1e-12
        assert inside[1:-1, 1:-1].all()  # at twice the size only the outermost ring reads beyond the image


# --- the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("synthetic", "ours-triton")])
@pytest.mark.parametrize("size", [28, 56])
def test_the_gate_passes_what_is_right(name: str, size: int, train_images: Split) -> None:
    if name == "ours-compiled" and size != 28:
        pytest.skip("one compilation is enough")
    if "kornia" in name:
        pytest.importorskip("kornia")  # of requirements-benchmark.txt
    try:
        pipeline = build(name, Setting(split=train_images, size=size, batch_size=32, dtype=torch.float32, workers=3))
    except ValueError as error:
        pytest.skip(str(error))
    finding = check(pipeline)
    assert finding["passed"] and finding["labels_in_order"] and not finding["reason"], finding
    assert finding["chain"] == pipeline.chain
    # at twice the size a single warp reads beyond the image at the outermost ring: (54 / 56)^2 = 0.93 at most
    assert 0.85 < finding["pixels_compared"] < (0.93 if size == 56 and "ours" in name else 1)
    # PIL rounds to whole grey levels after each step
    assert finding["largest_error"] <= (2.0 if "pil" in name else 0.05)


def test_what_cannot_run_here_says_why(train_images: Split) -> None:
    setting = Setting(split=train_images, size=28, batch_size=32, dtype=torch.float32, workers=2)
    for name, words in (
        ("ours-triton", "GPU"),
        ("torchvision-pil", "2 cores: the same as 2 workers"),
        ("torchvision-pil-2-resize-first", "nothing to resize"),
        ("kornia-resize-first", "nothing to resize"),
    ):
        with pytest.raises(ValueError, match=words):
            build(name, setting)


def test_the_gate_allows_bfloat16_its_rounding_and_no_more(train_images: Split) -> None:
    setting = Setting(split=train_images, size=28, batch_size=32, dtype=torch.bfloat16)
    finding = check(build("ours-eager", setting))
    # 8 significant bits: half a step is 2^-7 at normalised values from 2 on; times std 0.353 that is 0.703/255.
    assert finding["passed"]
    assert 0.1 < finding["largest_error"] <= 0.72


# --- photographs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_colour() -> Setting:
    split = photographs(torch.device("cpu"))
    return Setting(split=split, size=224, batch_size=8, dtype=torch.float32, workers=2)


def test_photographs_are_the_same_ones_for_ever_and_differ(in_colour: Setting) -> None:
    images, info = in_colour.split.images, in_colour.split.info
    assert images.shape == (512, 3, 256, 256) and len(images[:, 0, ::64, ::64].flatten(1).unique(dim=0)) == 512
    assert torch.equal(photographs(torch.device("cpu")).images, images)
    assert info.mean == pytest.approx((images.double() / 255).mean((0, 2, 3)).tolist(), abs=6e-5)
    assert info.std == pytest.approx((images.double() / 255).std((0, 2, 3)).tolist(), abs=6e-5)


COLOUR_LOADERS = ["torchvision-pil-2", "torchvision-v2-batch", "torchvision-v2-image", "kornia", "ours-compiled"]


@pytest.mark.parametrize(
    "name", ["ours-eager", *(pytest.param(name, marks=pytest.mark.thorough) for name in COLOUR_LOADERS)]
)
def test_the_gate_passes_photographs_that_are_right(name: str, in_colour: Setting) -> None:
    if name == "kornia":
        pytest.importorskip("kornia")  # of requirements-benchmark.txt
    finding = check(build(name, in_colour))
    assert finding["passed"] and finding["chain"] == "one warp", finding
    # torch reads beyond the crop at the outermost ring where it enlarges: (222 / 224)^2 = 0.982
    assert finding["pixels_compared"] == pytest.approx(0.982, abs=0.001)
    # PIL rounds the rows, then the columns it reads, and cuts what it recolours: 1.2 x 1 + 1
    assert finding["largest_error"] <= (2.3 if "pil" in name else 0.05)


@pytest.mark.parametrize("name", ["crop", "flip", "brightness", "contrast", "saturation"])
def test_the_gate_refuses_photographs_without_one_change(name: str, in_colour: Setting) -> None:
    class Without(V2):
        def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
            left_out = {"crop": (20, 32, 199, 180)}.get(name, getattr(Fixed(), name))  # one pixel less
            return super().apply_fixed(indices, Fixed(**vars(fixed) | {name: left_out}))

    excess, error, _ = transform_error(Without("torchvision-v2-batch", in_colour))
    assert excess > 0 and error > 2 / 255


def test_a_row_of_photographs_costs_its_own_bytes(in_colour: Setting) -> None:
    # three channels of 256 x 256 bytes read and of 224 x 224 float32 written, 29 float32 parameters, an index
    assert bytes_per_image(build("ours-compiled", in_colour)) == 3 * (256 * 256 + 4 * 224 * 224) + 4 * 29 + 8


@pytest.mark.thorough
def test_a_run_in_colour_writes_its_table(tmp_path: Path) -> None:
    loaders = ["synthetic", "ours-eager", "torchvision-pil-2", "torchvision-pil-2-resize-first", "torchvision-v2-batch"]
    quick = ["--batch", 8, "--rounds", 1, "--seconds", 0.01]
    done = benchmark("colour", "--loaders", *loaders, *quick, "--output", tmp_path / "colour")
    assert done.returncode == 0, done.stderr[-3000:]
    (raced,) = json.loads((tmp_path / "colour.json").read_text())["tables"]
    assert raced["title"] == "colour photographs, loaders alone, 256 to 224 px, batch 8"
    assert [row["name"] for row in raced["rows"]] == ["ours-eager", "torchvision-pil-2", "torchvision-v2-batch"]
    assert raced["ratio_to"] == "torchvision-pil-2" and min(row["ratio"] for row in raced["rows"]) > 0


class TurnedTheOtherWay(V2):
    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        return super().apply_fixed(indices, Fixed(**vars(fixed) | {"angle": -fixed.angle}))


class HalfAPixelOff(V2):
    def apply(self, indices: Tensor, transform: Any) -> Tensor:
        return super().apply(indices, lambda images: transform((images + images.roll(1, -1)) / 2))


class NeverErases(V2):
    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        return super().apply_fixed(indices, Fixed(**vars(fixed) | {"box": None}))


class ShuffledLabels(V2):
    def next(self) -> tuple[Tensor, Tensor]:
        images, labels = super().next()
        return images, labels.roll(1)


class ShuffledImages(V2):
    def next(self) -> tuple[Tensor, Tensor]:
        images, labels = super().next()
        return images.roll(1, 0), labels


class ShortBatches(V2):
    def next(self) -> tuple[Tensor, Tensor]:
        images, labels = super().next()
        return images[:-1], labels[:-1]


class WrongType(V2):
    def next(self) -> tuple[Tensor, Tensor]:
        images, labels = super().next()
        return images.half(), labels


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (TurnedTheOtherWay, "more than 2/255 off"),
        (HalfAPixelOff, "more than 2/255 off"),
        (NeverErases, "more than 2/255 off"),
        (ShuffledLabels, "labels in another order"),
        (ShuffledImages, "do not belong"),
        (ShortBatches, "delivers (31, 1, 56, 56)"),
        (WrongType, "torch.float16"),
    ],
)
def test_the_gate_refuses_what_is_wrong(wrong: type[V2], reason: str, setting: Setting) -> None:
    finding = check(wrong("torchvision-v2-batch", setting))
    assert not finding["passed"]
    assert reason in finding["reason"]


def test_the_cases_lie_within_what_the_race_draws() -> None:
    assert {case.flip for case in CASES} == {False, True}
    for case in CASES:
        assert abs(case.angle) <= 10 and max(abs(case.shift_x), abs(case.shift_y)) <= 2.8  # 10 % of 28


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_passes_all_on_a_gpu(train_images: Split, compute: Compute, dtype: torch.dtype) -> None:
    split = Split(images=train_images.images.to(compute.device), labels=train_images.labels.to(compute.device))
    setting = Setting(split=split, size=224, batch_size=64, dtype=dtype, workers=4)
    for name in PIPELINES:
        if "kornia" in name:
            pytest.importorskip("kornia")
        pipeline = build(name, setting)
        finding = check(pipeline) if name != "synthetic" else {"passed": True}
        assert finding["passed"], finding


# --- what is counted and when -------------------------------------------------------------------------------------


class Fake(Pipeline):
    def __init__(self, name: str, diary: list[str], counts: list[int]) -> None:
        self.name, self.diary, self.counts, self.steps = name, diary, counts, 0

    def start(self) -> None:
        self.diary.append(f"{self.name} starts")

    def stop(self) -> None:
        self.diary.append(f"{self.name} stops")

    def apply_fixed(self, indices: torch.Tensor, fixed: Fixed) -> torch.Tensor:
        return torch.zeros(len(indices))

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the race calls what it was given")

    def step(self) -> int:
        self.steps += 1
        return self.counts[self.steps % len(self.counts)]


def test_rounds_are_interleaved_and_only_timed_images_are_counted(compute: Compute) -> None:
    diary: list[str] = []
    fakes = [Fake("a", diary, [8]), Fake("b", diary, [8, 5])]  # b's every other batch is short
    samples = race(fakes, Fake.step, rounds=3, seconds=0.0, compute=compute)  # type: ignore[arg-type]
    assert diary == [f"{name} {what}" for _ in range(4) for name in "ab" for what in ("starts", "stops")]
    assert [sample["images"] for sample in samples["a"]] == [3 * 8] * 3
    # b: 6 steps to find the pace; then 2 of warm-up and 3 timed, in each round: steps 9 to 11, 14 to 16, 19 to 21
    assert [sample["images"] for sample in samples["b"]] == [5 + 8 + 5, 8 + 5 + 8, 5 + 8 + 5]
    assert [fake.steps for fake in fakes] == [2 * 3 + 3 * (2 + 3)] * 2


def test_a_round_takes_as_many_steps_as_fit(compute: Compute) -> None:
    now = 0.0

    def step(pipeline: Any) -> int:
        nonlocal now
        now += 0.001
        return 8

    with patch("fmnist.benchmark.timing.time.perf_counter", lambda: now):
        samples = race([Fake("a", [], [8])], step, rounds=1, seconds=0.1, compute=compute)  # type: ignore[list-item]
    assert samples["a"][0]["steps"] in (100, 101)  # rounding
    assert samples["a"][0]["seconds"] == pytest.approx(0.1, abs=0.0011)


def test_a_loader_with_workers_takes_whole_bursts() -> None:
    assert [round_up(steps, 16) for steps in (1, 16, 17)] == [16, 16, 32]


def test_the_step_timed_is_the_step_of_training_and_counts_what_it_trained(setting: Setting, compute: Compute) -> None:
    assert trainer_module.train_step is step.train_step
    setting = Setting(**vars(setting) | {"size": 28})
    trainer = Trainer(Config(model=ModelConfig(name="mlp")), compute)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    for name in ("synthetic", "ours-eager", "torchvision-v2-batch"):
        pipeline = build(name, setting)
        pipeline.start()
        assert [trainer.train_on(pipeline) for _ in range(2)] == [32, 32]
        pipeline.stop()
    assert trainer.loss.isfinite()
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    # The MLP is three matrix products, 6 operations per weight forward and backward; the first layer's input needs no
    # gradient: 784 x first width x 2 fewer.
    weights = [p for p in trainer.model.parameters() if p.ndim == 2]
    assert trainer.flops == 6 * sum(w.numel() for w in weights) - 2 * weights[0].numel()


def test_ours_can_repeat_one_epoch(train_images: Split) -> None:
    # 2,000 images are 2 steps of 800: the third batch begins another epoch, or the same one again
    shared = {"split": train_images, "size": 28, "batch_size": 800, "dtype": torch.float32}
    going_on, repeating = (build("ours-eager", Setting(**shared, repeat_epoch=repeat)) for repeat in (False, True))
    ours, again = ([pipeline.next() for _ in range(4)] for pipeline in (going_on, repeating))
    for step_number in (0, 1):
        assert torch.equal(again[step_number][0], ours[step_number][0])
        assert torch.equal(again[step_number + 2][0], ours[step_number][0])
        assert torch.equal(again[step_number + 2][1], ours[step_number][1])
        assert not torch.equal(ours[step_number + 2][1], ours[step_number][1])


def test_median_extremes_and_spread() -> None:
    result = summarize(
        [
            {"images": rate, "seconds": 1.0, "wall_seconds": 2.0, "steps": 1, "peak_memory_bytes": rate * 7}
            for rate in (100, 80, 120)
        ]
    )
    assert result["images_per_second"] == {"median": 100, "min": 80, "max": 120, "spread": 0.4, "wall_median": 50}
    assert (result["images"], result["peak_memory_bytes"]) == (300, 840)
    assert [item["images_per_second"] for item in result["rounds"]] == [100, 80, 120]
    assert result["rounds"][1]["wall_seconds"] == 2.0


def test_bytes_are_counted_as_read_and_written(setting: Setting) -> None:
    numbers, wide = torch.zeros(10), torch.zeros(1000, 4)
    with ByteCounter(torch.device("cpu")) as counter:
        numbers.view(2, 5)
        assert counter.total == 0
        numbers + 1
        assert counter.total == 40 + 40
        numbers.add_(1)
        assert counter.total == 80 + 80
        wide[torch.tensor([1, 2, 3])]
        assert counter.total >= 160 + 2 * 48 and counter.total < 160 + 2 * 48 + 100  # the rows, and the indices
    # The fused kernel: 784 pixels, 16 parameters, an index; 56 x 56 float32 written.
    assert bytes_per_image(build("ours-compiled", setting)) == 784 + 64 + 8 + 4 * 56 * 56
    eager = bytes_per_image(build("ours-eager", setting))
    assert eager is not None and eager > 8 * 4 * 56 * 56
    assert bytes_per_image(build("synthetic", setting)) is None
    assert bytes_per_image(build("torchvision-pil-2", setting)) is None


# --- the command line and what it writes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["data", "--sizes", "29"], "multiples of 4 from 8 to 512"),
        (["data", "--sizes", "516"], "multiples of 4 from 8 to 512"),
        (["train", "--models", "cnn@30"], "multiples of 4 from 8 to 512"),
        (["data", "--batch", "many"], "valid range: 4 to 8192"),
        (["data", "--batch", "3"], "valid range: 4 to 8192"),
        (["data", "--seconds", "nan"], "valid range: 0.01 to 600"),
        (["data", "--loaders", "dali"], "invalid choice"),
        (["data", "--loadrs", "kornia"], "did you mean --loaders"),
        (["train", "--models", "cnn"], "NAME@PIXELS"),
        (["data", "--scaling"], "requires train"),
        (["data", "--profile"], "requires train or all"),
        (["train", "--baseline", str(ROOT / "pyproject.toml")], "requires --scaling"),
        (["train", "--scaling", "--baseline", "x.json"], "x.json: no such file"),
        (["plot"], "JSON file"),
        (["data", str(ROOT / "pyproject.toml")], "JSON file"),
        (["plot", "absent.json"], "absent.json: no such file"),
        ([], "required"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv: list[str], words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        parse(argv)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1 and words in lines[0]


def test_help_and_a_misspelt_option_answer_before_torch_is_imported() -> None:
    script = (
        "import sys; from fmnist.benchmark.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    for argument, status in (("--help", 0), ("--rouns", 2)):
        done = execute(sys.executable, "-c", script, "all", argument, cwd=ROOT)
        assert done.returncode == status
        assert done.stdout.splitlines()[-1] == "False False"
        assert (len(done.stderr.splitlines()) == 1) == (status == 2)


def test_help_describes_every_loader(capsys: Any) -> None:
    assert tuple(PIPELINES) == tuple(LOADERS)
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"{name} " in text and description in text for name, description in LOADERS.items())
    assert "cnn@28 convnext_tiny@224" in text  # the defaults of a GPU


def benchmark(*args: object) -> subprocess.CompletedProcess[str]:
    return execute(sys.executable, "-m", "fmnist.benchmark", *args, cwd=ROOT)


@pytest.mark.thorough
def test_a_whole_run_writes_the_table_the_json_and_the_chart(tmp_path: Path) -> None:
    stem = tmp_path / "small"
    loaders = ["synthetic", "ours-eager", "torchvision-pil-2", "torchvision-v2-batch"]
    quick = ["--batch", 16, "--rounds", 2, "--seconds", 0.01, "--large_batch", 64]
    done = benchmark("all", "--sizes", 32, "--models", "mlp@28", "--loaders", *loaders, *quick, "--output", stem)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torchvision DataLoader, PIL, 2 workers" in done.stdout and "passed   ours-eager at 32 px" in done.stdout

    result = json.loads((tmp_path / "small.json").read_text())
    assert {"name", "command", "date", "hardware", "versions", "git_revision", "world_size", "options"} <= set(result)
    assert {"device", "processor", "cpu_cores", "clocks_before", "clocks_after"} <= set(result["hardware"])
    assert {"torch", "torchvision", "kornia", "triton"} <= set(result["versions"])
    assert min(result["ceilings"].values()) > 0
    assert all(item["passed"] and item["chain"] for item in result["gate"])
    loading, large, repeated, training = result["tables"]
    assert large["title"] == "loaders alone, 28 to 32 px, batch 64"
    assert repeated["title"] == "loaders alone, 28 to 32 px, batch 64, one epoch repeated"
    assert [row["name"] for row in large["rows"]] == [row["name"] for row in repeated["rows"]] == ["ours-eager"]
    assert [row["name"] for row in loading["rows"]] == loaders[1:]  # alone, a synthetic batch is no loader
    assert [row["name"] for row in training["rows"]] == loaders
    assert (loading["ratio_to"], training["ratio_to"]) == ("torchvision-pil-2", "synthetic")
    for row in loading["rows"] + training["rows"]:
        rate = row["images_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert len(row["rounds"]) == 2
        assert row["images"] == sum(16 * item["steps"] for item in row["rounds"])
        assert row["description"] == LOADERS[row["name"]]
    for raced in (loading, training):
        base = next(row for row in raced["rows"] if row["name"] == raced["ratio_to"])["images_per_second"]["median"]
        assert all(row["ratio"] == row["images_per_second"]["median"] / base for row in raced["rows"])
    assert all(row["mfu"] > 0 and row["roofline_images_per_second"] > 0 for row in training["rows"])
    assert loading["rows"][0]["share_of_copy_ceiling"] > 0
    assert (tmp_path / "small.png").stat().st_size > 10_000

    again = benchmark("plot", stem.with_suffix(".json"))
    assert again.returncode == 0, again.stderr


def test_a_refused_loader_is_not_timed_and_the_status_is_1(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(PIPELINES, "torchvision-v2-batch", TurnedTheOtherWay)
    monkeypatch.setattr(entry, "log_to_console", lambda: None)
    argv = ["data", "--sizes", "28", "--batch", "16", "--rounds", "1", "--seconds", "0.01"]
    argv += ["--loaders", "ours-eager", "torchvision-v2-batch", "--output", str(tmp_path / "wrong")]
    assert entry.main(argv) == 1
    captured = capsys.readouterr()
    assert "refused torchvision-v2-batch" in captured.err
    result = json.loads((tmp_path / "wrong.json").read_text())
    assert [row["name"] for row in result["tables"][0]["rows"]] == ["ours-eager"]
    assert [item["name"] for item in result["gate"] if not item["passed"]] == ["torchvision-v2-batch"]


# --- recompilations -----------------------------------------------------------------------------------------------


def test_graphs_compiled_while_the_clock_runs_are_counted(compute: Compute) -> None:
    torch._dynamo.reset()
    add_one = torch.compile(lambda numbers: numbers + 1, backend="eager", dynamic=False)  # a graph for each size

    class OfManySizes(Fake):
        def step(self) -> int:
            self.steps += 1
            add_one(torch.zeros({8: 8, 10: 10, 11: 11}.get(self.steps, 1)))
            return 8

    samples = race([OfManySizes("a", [], [])], lambda fake: fake.step(), 2, 0.0, compute)  # type: ignore[attr-defined]
    # six steps find the pace; the rounds time steps 9 to 11 and 14 to 16, after two of warm-up each
    assert [sample["recompilations"] for sample in samples["a"]] == [2, 0]
    torch._dynamo.reset()


class ShrinksOnce(V2):
    """Another size of its fifth batch, each time it starts: at least one new graph in every round."""

    starts = 0

    def start(self) -> None:
        super().start()
        self.starts += 1

    def next(self) -> tuple[Tensor, Tensor]:
        images, labels = super().next()
        count = len(labels) - self.starts * (self.position == 5)
        return images[:count], labels[:count]


@pytest.mark.thorough
def test_rows_of_compiled_variants_say_how_often_they_compiled(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend="eager", **options))
    monkeypatch.setitem(PIPELINES, "torchvision-v2-batch", ShrinksOnce)
    monkeypatch.setattr(entry, "log_to_console", lambda: None)
    argv = ["train", "--models", "mlp@28", "--variants", "eager", "compiled", "--batch", "256", "--rounds", "2"]
    argv += ["--seconds", "0.01", "--loaders", "ours-eager", "torchvision-v2-batch", "--profile"]
    assert entry.main([*argv, "--output", str(tmp_path / "compiled")]) == 0
    eager, compiled = json.loads((tmp_path / "compiled.json").read_text())["tables"]
    assert all("recompilations" not in item for item in eager["rows"])
    assert [item["recompilations"] for item in compiled["rows"]] == [0, 2]  # one in each round
    assert [item["recompilations"] for item in compiled["rows"][1]["rounds"]] == [1, 1]
    assert all(item["profile"]["ms_per_step"]["matrix product"] > 0 for item in eager["rows"] + compiled["rows"])
    before, after = capsys.readouterr().out.split("training mlp, 28 px, compiled")
    assert "recompiled" not in before
    assert [line.split()[-1] for line in after.strip().splitlines()[1:5]] == ["recompiled", "-" * 10, "0", "2"]


# --- where the time of a step goes --------------------------------------------------------------------------------


def test_operators_are_sorted_by_their_names_and_callers() -> None:
    for names, kind in (
        (["aten::mkldnn_convolution", "aten::conv2d"], "convolution"),
        (["cudnn::maxwell::dgrad2d_c1_k1_nhwc", "aten::convolution_backward"], "convolution"),
        (["nvjet_sm90_tst_192x192", "aten::addmm", "aten::linear"], "matrix product"),
        (["aten::silu"], "norm, elementwise"),
        (["aten::copy_", "aten::to", "Optimizer.step#AdamW.step"], "optimizer"),  # whatever the optimizer calls
        (["aten::mm", operators.DATA], "data"),
        (["triton_red_fused_convolution_layer_norm_1", "CompiledFunction"], "compiled"),
        (["SiluBackward0"], "other"),
        (["_augment_kernel"], "data"),
    ):
        assert operators.class_of(names) == kind, names


def test_idle_is_what_no_kernel_covers() -> None:
    # 0 to 4 and 6 to 10 of 10 are covered, the overlap once
    assert operators.idle_share([(6.0, 10.0), (0.0, 3.0), (2.0, 4.0), (7.0, 8.0)]) == pytest.approx(0.2)
    assert operators.idle_share([(5.0, 6.0)]) == 0 and operators.idle_share([]) is None


def test_spans_of_annotations_are_no_work_and_what_no_operator_launched_counts() -> None:
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def on_gpu(name: str, start: float, end: float, annotation: bool = False) -> Any:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=gpu, time_range=time_range, is_user_annotation=annotation)

    def on_host(name: str, *kernels: tuple[str, float]) -> Any:
        launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
        return SimpleNamespace(name=name, device_type=cpu, cpu_parent=None, kernels=launched)

    # of 0 to 10 ms, 0 to 2 and 6 to 10 are covered; the spans cover all
    events = [
        *(on_gpu(operators.DATA, 0.0, 5000.0, True), on_gpu("Optimizer.step#AdamW.step", 4000.0, 10_000.0, True)),
        *(on_gpu("_augment_kernel", 0.0, 1000.0), on_gpu("_augment_kernel", 1000.0, 2000.0)),
        *(on_gpu("sm90_gemm", 6000.0, 9000.0), on_gpu("vectorized", 9000.0, 10_000.0)),
        on_host(operators.DATA, (operators.DATA, 5000.0), ("_augment_kernel", 1000.0)),
        *(on_host("aten::mm", ("sm90_gemm", 3000.0)), on_host("Optimizer.step#AdamW.step", ("vectorized", 1000.0))),
    ]
    profile = operators.sorted_by_class(events, on_cpu=False)
    assert profile["idle_share"] == pytest.approx(0.4)
    assert profile["ms_per_step"] == {
        "matrix product": 1.0,
        "data": pytest.approx(2 / 3, abs=1e-4),
        "optimizer": 0.3333,
    }


def test_a_step_is_profiled_by_class(setting: Setting, compute: Compute) -> None:
    setting = Setting(**vars(setting) | {"size": 28})
    trainer = Trainer(Config(model=ModelConfig(name="cnn", options={"widths": [4, 8]})), compute)
    rows: list[dict[str, Any]] = []
    for name in ("synthetic", "ours-eager"):
        rows.append({"description": name})
        operators.time_by_class(trainer.train_on, build(name, setting), compute.device, rows[-1])
    noise, ours = (item["profile"]["ms_per_step"] for item in rows)
    assert (
        {"convolution", "matrix product", "norm, elementwise", "optimizer", "data", "other"} == set(noise) == set(ours)
    )
    assert min([*noise.values(), *ours.values()]) >= 0 and list(ours.values()) == sorted(ours.values(), reverse=True)
    assert all(item["profile"]["idle_share"] is None for item in rows)  # a CPU has no timeline of its own
    text = render_profile({"rows": [*rows, {"description": "kornia", "failed": "gone"}]})
    assert "idle" not in text and "kornia" not in text and f"{ours['convolution']:.3f}" in text
    assert render_profile({"rows": [{"description": "kornia"}]}) == ""


# --- loaders that fail --------------------------------------------------------------------------------------------


class Failing(Fake):
    def step(self) -> int:
        if self.steps == 9:  # 6 to find the pace, 2 of warm-up and the first timed one are done
            raise OSError("the disk is gone\nsee the system's log")
        return super().step()


def test_a_loader_that_raises_while_it_is_timed_fails_alone(compute: Compute) -> None:
    diary: list[str] = []
    fakes = [Failing("a", diary, [8]), Fake("b", diary, [8])]
    samples = race(fakes, lambda fake: fake.step(), rounds=3, seconds=0.0, compute=compute)  # type: ignore[attr-defined]
    assert samples["a"] == "OSError: the disk is gone"
    assert [sample["images"] for sample in samples["b"]] == [3 * 8] * 3
    turns = [f"{name} {what}" for name in "ab" for what in ("starts", "stops")]
    assert diary == 2 * turns + 2 * turns[2:]  # a fails in the first timed round, is stopped, and not started again


class WontStart(Fake):
    def start(self) -> None:
        raise RuntimeError

    def stop(self) -> None:
        raise AttributeError("nothing to stop")


class WontStop(Fake):
    def stop(self) -> None:
        raise RuntimeError("cannot join the workers")


@pytest.mark.parametrize(
    ("kind", "reason"), [(WontStart, "RuntimeError"), (WontStop, "RuntimeError: cannot join the workers")]
)
def test_the_first_reason_is_reported(kind: type[Fake], reason: str, compute: Compute) -> None:
    fakes = [kind("a", [], [8]), Fake("b", [], [8])]
    samples = race(fakes, lambda fake: fake.step(), rounds=1, seconds=0.0, compute=compute)  # type: ignore[attr-defined]
    assert samples["a"] == reason and len(samples["b"]) == 1


def test_what_is_fatal_is_no_row(compute: Compute) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        race([Failing("a", [], [8])], lambda fake: fake.step(), 3, 0.0, compute, fatal=(OSError,))  # type: ignore[attr-defined]


class Unreadable(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        raise ValueError(f"picture {index} cannot be read")

    def __len__(self) -> int:
        return 4


def test_a_workers_own_error_is_the_reason() -> None:
    reason = failure_of(lambda: next(iter(torch.utils.data.DataLoader(Unreadable(), num_workers=1))))
    assert reason == "ValueError: picture 0 cannot be read"
    assert failure_of(lambda: None) == ""


class WorkersDie(PilLoader):
    """Its workers kill themselves in the first timed round: the gate and the search for the pace come before."""

    starts = 0

    def start(self) -> None:
        self.starts += 1
        super().start()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.starts == 3 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class RaisesAtTheGate(V2):
    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        raise TypeError("another version of the library")


def test_a_dead_worker_is_one_failed_row_and_all_others_are_timed(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(PIPELINES, "torchvision-pil-2", WorkersDie)
    monkeypatch.setitem(PIPELINES, "torchvision-v2-image", RaisesAtTheGate)
    monkeypatch.setattr(entry, "log_to_console", lambda: None)
    argv = ["data", "--sizes", "28", "--batch", "16", "--rounds", "2", "--seconds", "0.01", "--large_batch", "0"]
    loaders = ["torchvision-pil-2", "ours-eager", "torchvision-v2-image", "torchvision-v2-batch"]
    assert entry.main([*argv, "--loaders", *loaders, "--output", str(tmp_path / "dead")]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "fmnist benchmark: error: torchvision-pil-2, torchvision-v2-image failed: see above"
    ]
    (raced,) = json.loads((tmp_path / "dead.json").read_text())["tables"]
    dead, eager, raises, batch = raced["rows"]
    assert [item["name"] for item in raced["rows"]] == loaders
    assert re.fullmatch(r"RuntimeError: DataLoader worker \(pid \d+\) is killed by signal: Killed\.", dead["failed"])
    assert raises["failed"] == "TypeError: another version of the library"
    assert "images_per_second" not in dead and "images_per_second" not in raises
    for timed in (eager, batch):
        assert len(timed["rounds"]) == 2 and timed["images_per_second"]["median"] > 0
        assert timed["ratio"] is None  # to the loader that failed
    said = [line for line in captured.out.splitlines() if "killed by signal" in line]
    assert len(said) == 1 and said[0].startswith("torchvision DataLoader, PIL, 2 workers")
    assert (tmp_path / "dead.png").stat().st_size > 10_000


@pytest.mark.thorough
def test_where_all_fail_there_is_a_table_and_no_chart(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(PIPELINES, "torchvision-v2-image", RaisesAtTheGate)
    monkeypatch.setattr(entry, "log_to_console", lambda: None)
    argv = ["data", "--sizes", "28", "--batch", "16", "--loaders", "torchvision-v2-image"]
    assert entry.main([*argv, "--output", str(tmp_path / "all")]) == 1
    assert "another version of the library" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


FAILS_ON_RANK_1 = """
import sys
from fmnist.benchmark import __main__ as entry
from fmnist.benchmark.libraries import PIPELINES, V2

class Fails(V2):
    def next(self):
        if self.setting.rank == 1 and self.position == 3:  # after the gate's three batches
            raise OSError("no disk on this machine")
        return super().next()

PIPELINES["torchvision-v2-batch"] = Fails
raise SystemExit(entry.main(sys.argv[1:]))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["data", "train"])
def test_a_loader_that_fails_on_one_process_fails_on_all(mode: str, tmp_path: Path) -> None:
    (tmp_path / "race.py").write_text(FAILS_ON_RANK_1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    quick = ["--sizes", "28", "--models", "mlp@28", "--batch", "16", "--rounds", "1", "--seconds", "0.01"]
    quick += ["--large_batch", "0", "--loaders", "torchvision-v2-batch", "ours-eager"]
    command += [str(tmp_path / "race.py"), mode, *quick, "--output", str(tmp_path / "two")]
    env = environment()
    done = execute(*command, env=env, cwd=ROOT)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "no disk on this machine" in done.stdout + done.stderr
    if mode == "train":  # the other process waits inside the step: there is no row to be had
        return
    (raced,) = json.loads((tmp_path / "two.json").read_text())["tables"]
    failed, timed = raced["rows"]
    assert failed["failed"] == "OSError: no disk on this machine"
    assert timed["rounds"][0]["images"] == 2 * 16 * timed["rounds"][0]["steps"]


def row(name: str, median: float, **more: Any) -> dict[str, Any]:
    rate = {"median": median, "min": 0.9 * median, "max": 1.1 * median, "spread": 0.2}
    return {"name": name, "description": f"the {name} loader", "images_per_second": rate} | more


def table(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    shared = {"mode": "train", "title": "training cnn", "dtype": "bfloat16", "ratio_to": "synthetic"}
    return shared | {"rows": rows} | more


def test_ratios_are_to_one_loader_and_efficiencies_per_process() -> None:
    single = {"world_size": 1, "tables": [table([row("synthetic", 1000), row("ours-triton", 900)])]}
    four = table([row("synthetic", 3600), row("ours-triton", 3240)])
    add_ratios(four, "synthetic", single, 4)
    assert [item["ratio"] for item in four["rows"]] == [1.0, 0.9]
    assert [item["efficiency"] for item in four["rows"]] == [0.9, 0.9]  # 3600 / (4 x 1000), 3240 / (4 x 900)
    for baseline in (single | {"world_size": 2}, single | {"tables": []}):
        with pytest.raises(ValueError, match="not measured on one process"):
            add_ratios(four, "synthetic", baseline, 4)
    alone = table([row("kornia", 10)])
    add_ratios(alone, "torchvision-pil-2", None, 1)  # it did not run
    assert alone["ratio_to"] is None and alone["rows"][0]["ratio"] is None and "efficiency" not in alone["rows"][0]


def test_the_table_leaves_out_columns_that_hold_nothing() -> None:
    text = render_table(table([row("synthetic", 12345.6, ratio=1.0, mfu=0.25, peak_memory_bytes=3_210_000_000)]))
    assert "12,346" in text and "25.0%" in text and "3.21 GB" in text
    assert text.splitlines()[2].split() == ["loader", "images/s", "best", "spread", "ratio", "MFU", "peak", "memory"]
    assert "efficiency" not in text and "bytes/s" not in text


def test_numbers_have_three_digits_and_a_prefix() -> None:
    assert [scaled(value, "B/s") for value in (0.5, 999, 4.314e12, 3.2e16)] == [
        "0.5 B/s",
        "999 B/s",
        "4.31 TB/s",
        "3.2e+04 TB/s",
    ]
    assert scaled(1234.0) == "1.23 k"


def test_a_failed_row_says_why_and_has_no_number(tmp_path: Path) -> None:
    dead = {"name": "kornia", "description": "the kornia loader", "failed": "RuntimeError: gone"}
    for mode, name in (("train", "synthetic"), ("data", "torchvision-pil-2")):
        raced = table([dead, row(name, 100.0)], mode=mode)
        add_ratios(raced, name, None, 1)
        assert raced["rows"][1]["ratio"] == 1.0 and "ratio" not in raced["rows"][0]
        title, head, _, first, second = render_table(raced).strip().splitlines()
        assert "failed" in head
        assert first.split() == ["the", "kornia", "loader", "-", "-", "-", "-", "RuntimeError:", "gone"]
        assert second.split()[-5:] == ["100", "110", "20.0%", "1", "-"]
        result = {
            "hardware": {"device": "a GPU", "cpu_cores": 1},
            "versions": {"torch": "2"},
            "date": "",
            "world_size": 1,
        }
        draw(result | {"tables": [raced]}, tmp_path / f"{mode}.png")
        with pytest.raises(ValueError, match="no table"):
            draw(result | {"tables": [table([dead])]}, tmp_path / "none.png")


def test_the_chart_draws_any_number_of_races(tmp_path: Path) -> None:
    result: dict[str, Any] = {
        "hardware": {"device": "a GPU", "cpu_cores": 16},
        "versions": {"torch": "2"},
        "date": "today",
        "world_size": 2,
    }
    roof = {"roofline_images_per_second": 20000.0}
    races_drawn = [
        table([row("synthetic", 5000.0, ratio=1.0, **roof)]),
        table([row("ours-triton", 9e3, **roof), row("kornia", 1e2)], mode="data", ratio_to=None),
        table([row("synthetic", 5.0, **roof)]),
    ]
    for count in (1, 2, 3):
        draw(result | {"tables": races_drawn[:count]}, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no table"):
        draw(result | {"tables": []}, tmp_path / "none.png")
