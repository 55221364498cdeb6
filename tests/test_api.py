"""From Python: train, resume, open, predict and evaluate in one process, which is afterwards as it was before."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, execute
from PIL import Image

import fmnist
from fmnist.config.parse import load_config, parse_config
from fmnist.config.schema import BatchConfig, Config, LogConfig, ModelConfig, ScheduleConfig
from fmnist.data.fashion_mnist import CLASS_NAMES, load
from fmnist.run import Run

QUICK: dict[str, Any] = {
    "data": {"val_size": 0},
    "batch": {"global_batch_size": 32},
    "model": {"options": {"width": 16}},
    "evaluation": {"test": False},
    "log": {"every_steps": 1, "wandb": "disabled"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fmnist.RunResults:
    folder = tmp_path_factory.mktemp("api")
    (folder / "small.yaml").write_text(SMALL_RUN)
    return fmnist.train(folder / "small.yaml", output_dir=str(folder / "run"), schedule={"steps": 6, "warmup_steps": 2})


def state() -> tuple[Any, ...]:
    """What a notebook's next cell would notice."""
    loggers = [logging.getLogger(name) for name in ("fmnist",)]
    return (
        [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers],
        [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
        (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.initial_seed()),
        torch.backends.cudnn.deterministic,
    )


def test_importing_it_imports_no_torch() -> None:
    code = "import fmnist, sys; print('torch' in sys.modules, fmnist.__all__)"
    done = execute(sys.executable, "-c", code, timeout=60)
    assert done.stdout == "False ['RunResults', 'open_run', 'train']\n", done.stderr


def test_the_run_has_its_numbers(run: fmnist.RunResults) -> None:
    assert run.summary["status"] == "finished" and run.summary["steps"] == 6
    lines = run.metrics()
    assert [line["step"] for line in lines if line["prefix"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    (test,) = (line for line in lines if line["prefix"] == "test")
    assert run.evaluate("test")["top1"] == test["top1"] == run.summary["test.top1"]
    on_val = run.evaluate("val", tta="flip")
    assert on_val["num_images"] == 1000 and len(on_val["confusion_matrix"]) == 10


def test_two_trainings_in_one_process_leave_it_as_it_was(tmp_path: Path) -> None:
    before, drawn = state(), torch.random.get_rng_state()
    results = []
    for name, precision, exact in (("a", "fp32", None), ("b", "bf16", None), ("c", "fp32", 2), ("a", "fp32", None)):
        cfg = Config(
            batch=BatchConfig(global_batch_size=32),
            model=ModelConfig(name="mlp", options={"width": 16}, precision=precision),  # type: ignore[arg-type]
            log=LogConfig(wandb="disabled"),
            exact=exact,
        )
        schedule = {"steps": 3, "warmup_epochs": 0.0}
        results.append(fmnist.train(cfg, output_dir=str(tmp_path / name), schedule=schedule, **{"log.every_steps": 1}))
        assert state() == before and torch.equal(torch.random.get_rng_state(), drawn)
    assert [result.summary["steps"] for result in results] == [3, 3, 3, 3]
    assert results[0].trained.cfg.schedule == ScheduleConfig(steps=3)
    # The last one found its run finished, and trained nothing.
    log = (tmp_path / "a" / "train.log").read_text()
    assert log.count("a new run") == 1
    losses = [[line["loss"] for line in result.metrics() if line["prefix"] == "train"] for result in results]
    assert losses[0] == losses[3] and losses[0] != losses[1]


def test_paths_pictures_and_arrays_give_one_answer(run: fmnist.RunResults, tmp_path: Path) -> None:
    images = load("test")[0][:4]
    expected = (run.trained(images)[0].double() / run.summary["temperature"]).softmax(1)
    answers = run.predict(images, top=10)
    assert [len(answer) for answer in answers] == [10] * 4
    for answer, row in zip(answers, expected.tolist(), strict=True):
        assert dict(answer) == {name: pytest.approx(p) for name, p in zip(CLASS_NAMES, row, strict=True)}
        assert [p for _, p in answer] == sorted((p for _, p in answer), reverse=True)
    Image.fromarray(images[1].numpy()).save(tmp_path / "1.png")
    mixed = [images[0].numpy(), tmp_path / "1.png", Image.fromarray(images[2].numpy()), images[3:4]]
    assert [answer[0][0] for answer in run.predict(mixed)] == [answer[0][0] for answer in answers]
    assert run.predict(str(tmp_path / "1.png"), top=1) == [[(answers[1][0][0], pytest.approx(answers[1][0][1]))]]
    assert run.predict([]) == []


def test_an_array_that_is_read_only_is_predicted_without_a_warning(run: fmnist.RunResults) -> None:
    image = load("test")[0][0].numpy()
    locked = np.asarray(Image.fromarray(image))
    assert not locked.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = run.predict([locked, image[:, ::-1]])
    assert answers == run.predict([image, image[:, ::-1].copy()]) and not locked.flags.writeable


def test_a_picture_that_pillow_opened_is_turned_upright_too(run: fmnist.RunResults, tmp_path: Path) -> None:
    upright = Image.fromarray(255 - load("test")[0][1].numpy()).convert("RGB").resize((280, 280))
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as picture:
        assert run.predict(picture) == run.predict(tmp_path / "phone.png") == run.predict(upright)


def test_every_kind_of_picture_works_or_is_one_line(run: fmnist.RunResults, tmp_path: Path) -> None:
    images = load("test")[0][:3].numpy()
    answers = run.predict(images)
    wide = np.repeat(np.repeat(images[:1], 2, axis=1), 2, axis=2)

    def best(found: list[list[tuple[str, float]]]) -> list[str]:  # a batch of another size rounds otherwise
        return [answer[0][0] for answer in found]

    assert best(run.predict([images[0], wide, images[1:]])) == best([answers[0], *answers])  # 28 and 56 px
    assert best(run.predict(images[::-1])) == best(answers)[::-1] and len(run.predict(images[:, :, ::-1])) == 3
    assert run.predict(images[:0]) == run.predict([]) == run.predict(iter(())) == []
    assert run.predict(tuple(images)) == answers == run.predict(torch.from_numpy(images))
    assert run.predict(images, top=np.int64(1))[0] == answers[0][:1]
    (tmp_path / "broken.png").write_bytes(b"\\x89PNG")
    wrong: list[tuple[Any, str]] = [
        (None, "images is None; expected paths"),
        (7, "images is 7"),
        (b"a.png", "images is b'a.png'"),
        ({"a": 1}, "images is {'a': 1}"),
        ([None], "a picture is None"),
        ([[0, 1]], r"a picture is [0, 1]"),
        (images[:, :0], "uint8 [3, 0, 28]"),
        (np.zeros((28, 0), np.uint8), "uint8 [28, 0]"),
        (images[None], "uint8 [1, 3, 28, 28]"),
        (images > 0, "bool [3, 28, 28]"),
        (np.array([["a.png"]]), "<U5 [1, 1]"),
        (tmp_path / "broken.png", "broken.png: "),
        (str(tmp_path), "a folder"),
    ]
    for value, words in wrong:
        with pytest.raises(ValueError) as error:
            run.predict(value)
        assert words in str(error.value) and "\\n" not in str(error.value), value
    for top in (2.5, 0, True, "3", None):
        with pytest.raises(ValueError, match="^top is .*; valid: a whole number from 1 to 10$"):
            run.predict(images, top=top)


def test_minutes_take_the_place_of_a_configs_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Config] = []
    monkeypatch.setattr("fmnist.apps.api.parse_config", lambda flags: parsed.append(parse_config(flags)) or parsed[-1])
    with pytest.raises(ValueError, match="dry_run"):  # before anything is trained
        fmnist.train(load_config(ROOT / "configs/mlp.yaml"), schedule={"minutes": 2}, dry_run=True)
    assert (parsed[-1].schedule.minutes, parsed[-1].optim.name) == (2.0, "muon")
    with pytest.raises(ValueError, match="two lengths"):
        fmnist.train(load_config(ROOT / "configs/mlp.yaml"), schedule={"minutes": 2, "epochs": 3}, dry_run=True)


def test_a_mistake_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the exception alone, whether the flags or the run find it."""
    for options in ({"optim": {"lr": -1.0}}, {"data": {"root": str(ROOT)}, "output_dir": str(tmp_path / "run")}):
        with pytest.raises(ValueError):
            fmnist.train("configs/mlp.yaml", **options)
    assert "error" not in capfd.readouterr().err


@pytest.mark.thorough
def test_an_interrupt_stops_at_the_next_step_and_the_same_call_resumes(tmp_path: Path) -> None:
    """As the stop button of a notebook."""
    before = state()
    options = QUICK | {"output_dir": str(tmp_path / "run"), "schedule": {"steps": 200, "warmup_epochs": 0.0}}

    def press() -> None:
        while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    stopped = fmnist.train("configs/mlp.yaml", **options)
    assert stopped.summary["status"] == "stopped" and 0 < stopped.summary["steps"] < 200
    assert state() == before
    assert fmnist.train("configs/mlp.yaml", **options).summary["status"] == "finished"
    assert (tmp_path / "run/learning_curves.png").exists()  # without the test images too


@pytest.mark.thorough
def test_a_signal_to_end_reaches_the_program_once_the_run_has_saved(tmp_path: Path) -> None:
    """A script that trains run after run would otherwise begin the next, until it is killed."""
    script = f"""
import fmnist
options = {QUICK | {"schedule": {"steps": 4000, "warmup_epochs": 0.0}}}
fmnist.train("configs/mlp.yaml", output_dir={str(tmp_path / "first")!r}, **options)
fmnist.train("configs/mlp.yaml", output_dir={str(tmp_path / "second")!r}, **options)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    metrics = tmp_path / "first/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=120) == -signal.SIGTERM
    summary = json.loads((tmp_path / "first/summary.json").read_text())
    assert (summary["status"], summary["stopped_by"]) == ("stopped", "SIGTERM") and 0 < summary["steps"] < 4000
    assert not (tmp_path / "second").exists()


def test_so_does_one_that_comes_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the test images are evaluated, the run is finished all the same."""
    heard, whole = list[int](), Run.finish

    def finish(run: Any, summary: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        whole(run, summary)

    monkeypatch.setattr("fmnist.run.Run.finish", finish)
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        options = QUICK | {"output_dir": str(tmp_path / "run"), "schedule": {"steps": 2, "warmup_epochs": 0.0}}
        run = fmnist.train("configs/mlp.yaml", **options)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and run.summary["status"] == "finished" and "stopped_by" not in run.summary


def test_a_run_that_fails_closes_its_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = QUICK | {"output_dir": str(tmp_path / "run"), "schedule": {"steps": 50, "warmup_epochs": 0.0}}
    options |= {"log": {"every_steps": 1, "wandb": "offline"}, "optim": {"lr": 100.0, "weight_decay": 1.0}}
    before = state()
    with pytest.raises(FloatingPointError):  # the weights grow by a factor of 99 a step
        fmnist.train("configs/mlp.yaml", **options)
    assert wandb.run is None and state() == before
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))


def test_mistakes_are_value_errors_of_one_line(run: fmnist.RunResults, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"schedule": {"epoch": 1}}, "schedule.epochs"),
        ({"scedule": {"epochs": 1}}, "schedule"),
        ({"optim": {"lr": -1.0}}, "optim.lr"),
        ({"data": {"root": str(ROOT / "README.md")}, "output_dir": str(tmp_path / "run")}, "README.md"),
        ({"output_dir": str(run.directory)}, "holds a run with another config"),
        ({"dry_run": True}, "dry_run trains nothing"),
    ]
    before = state()
    for options, words in wrong:
        with pytest.raises(ValueError) as error:
            fmnist.train("configs/mlp.yaml", **options)
        assert words in str(error.value) and "\n" not in str(error.value), options
        assert state() == before
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        fmnist.open_run("nowhere")
    with pytest.raises(ValueError, match=r"absent\.png: no such file"):
        run.predict("absent.png")
    with pytest.raises(ValueError, match=r"float64 \[2, 28, 28\]; expected uint8"):
        run.predict(np.zeros((2, 28, 28)))
    with pytest.raises(ValueError, match="top is 11; valid: a whole number from 1 to 10"):
        run.predict(load("test")[0][:1], top=11)
    with pytest.raises(AttributeError, match="no attribute 'predict'"):
        fmnist.predict  # noqa: B018
