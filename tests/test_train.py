"""The whole system, as a user runs it: processes, kills, signals, mistakes."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment, metrics, train, warm_train
from safetensors.torch import load_file
from warm import run_program

from fmnist.data.find import locate

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def flags(config: Path, run: Path, *more: object) -> list[object]:
    return ["--config", config, "--output_dir", run, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An unbroken run of the small config, and that config."""
    from conftest import SMALL_RUN

    folder = tmp_path_factory.mktemp("finished")
    config, run = folder / "small.yaml", folder / "run"
    config.write_text(SMALL_RUN)
    train(*flags(config, run))
    return config, run


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_run_leaves_what_the_contract_names(finished: tuple[Path, Path]) -> None:
    _, run = finished
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["model"], summary["steps"], summary["world_size"], summary["seed"]) == ("cnn", 12, 1, 0)
    assert summary["test.num_images"] == 10_000
    assert 0.1 < summary["test.top1"] <= 1
    assert summary["parameters"] == sum(
        t.numel() for n, t in load_file(run / "model.safetensors").items() if "running" not in n and "num_" not in n
    )
    assert {
        "epochs",
        "val.top1",
        "test.loss",
        "images_per_second",
        "train_seconds",
        "device",
        "versions",
        "git_revision",
    } <= set(summary)
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "train.log", "evaluation"} <= names
    assert {"learning_curves.png", "train_batch.png"} <= names
    steps = [line["step"] for line in metrics(run) if line["prefix"] == "train"]
    assert steps == list(range(1, 13))
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-2:] == ["step_00000011", "step_00000012"]


@pytest.mark.thorough
def test_the_epoch_of_the_lowest_loss_is_kept_where_that_is_asked_for(tmp_path: Path, small_config: Path) -> None:
    run = tmp_path / "run"
    flags = ("--evaluation.every_steps", 2, "--optim.lr", 0.05, "--evaluation.test", "false")
    warm_train("--config", small_config, *flags, "--evaluation.best", "loss", "--output_dir", run)
    val = [line for line in metrics(run) if line["prefix"] == "val"]
    best = min(val, key=lambda line: line["loss"])
    assert {"top1", "macro_f1", "balanced_accuracy", "loss"} <= best.keys() and "top5" not in best
    summary = json.loads((run / "summary.json").read_text())
    assert {name: summary[f"val.{name}"] for name in ("top1", "macro_f1", "balanced_accuracy", "loss")} == {
        name: best[name] for name in ("top1", "macro_f1", "balanced_accuracy", "loss")
    }
    kept = run / f"checkpoints/step_{best['step']:08d}/ema.safetensors"
    assert kept.read_bytes() == (run / "model.safetensors").read_bytes()
    refused = warm_train("--config", small_config, *flags, "--output_dir", run, check=False)
    assert refused.returncode == 2 and "evaluation.best was loss, now top1" in refused.stderr


@pytest.mark.thorough
def test_a_run_with_full_checkpoints_at_its_end_alone_has_the_weights_of_one_with_many(
    tmp_path: Path, small_config: Path
) -> None:
    run, often = tmp_path / "run", tmp_path / "often"
    flags = ("--config", small_config, "--evaluation.every_steps", 2, "--optim.lr", 0.05, "--evaluation.test", "false")
    warm_train(*flags, "--output_dir", often)
    warm_train(*flags, "--checkpoint.every_steps", 12, "--output_dir", run)
    val = [line for line in metrics(run) if line["prefix"] == "val"]
    best = max(val, key=lambda line: (line["top1"], -line["step"]))["step"]
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == [f"best_{best:08d}"] * (best != 12) + ["step_00000012"]
    assert (run / "model.safetensors").read_bytes() == (often / "model.safetensors").read_bytes()


@pytest.mark.thorough
def test_while_small_images_are_trained_validation_has_their_size(tmp_path: Path, small_config: Path) -> None:
    growing = ("--data.limit", 192, "--evaluation.every_steps", 2, "--augment.size", "{0: 20, 1: 28}")
    command = ["--config", small_config, *growing, "--evaluation.test", "false", "--output_dir"]
    warm_train(*command, tmp_path / "whole")
    val = [line for line in metrics(tmp_path / "whole") if line["prefix"] == "val"]
    assert [line.get("size") for line in val] == [20.0 if line["epoch"] <= 1 else None for line in val]
    assert {line.get("size") for line in val} == {20.0, None}
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    large = [line for line in val if line["epoch"] > 1]
    assert summary["val.top1"] == max(line["top1"] for line in large) and "val.size" not in summary

    # where a size is given, it is that of all
    warm_train(*command, tmp_path / "fixed", "--evaluation.size", 20)
    fixed = [line for line in metrics(tmp_path / "fixed") if line["prefix"] == "val"]
    assert {line["size"] for line in fixed} == {20.0}
    small = [line for line in val if line["epoch"] <= 1]
    assert small == fixed[: len(small)]
    assert [line["loss"] for line in fixed[len(small) :]] != [line["loss"] for line in large]

    # stopped at the smaller size and continued, the best is that of the unbroken run
    stopped = [*command, tmp_path / "stopped", "--max_minutes"]
    warm_train(*stopped, 0.001)
    assert json.loads((tmp_path / "stopped/summary.json").read_text())["steps"] < len(small) * 2
    warm_train(*command, tmp_path / "stopped")
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert [line for line in metrics(tmp_path / "stopped") if line["prefix"] == "val"] == val


@pytest.mark.thorough
def test_evaluate_gives_what_training_gave_and_the_same_command_again_changes_nothing(
    finished: tuple[Path, Path],
) -> None:
    config, run = finished
    before = json.loads((run / "evaluation/test/metrics.json").read_text())
    stamp = (run / "summary.json").stat().st_mtime_ns
    shutil.rmtree(run / "evaluation")
    done = run_program(ROOT / "evaluate.py", run, "--batch_size", 333, "--quick", env=environment())
    assert done.returncode == 0, done.stderr
    after = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert after["confusion_matrix"] == before["confusion_matrix"]
    assert after["top1"] == before["top1"] == json.loads((run / "summary.json").read_text())["test.top1"]
    assert np.sum(after["confusion_matrix"]) == 10_000
    assert "is finished: test top1" in warm_train(*flags(config, run)).stderr
    assert (run / "summary.json").stat().st_mtime_ns == stamp


@pytest.mark.thorough
def test_test_images_left_out_at_first_are_evaluated_when_they_are_wanted(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = finished
    tried = tmp_path / "tried"
    left_out = flags(config, tried, "--evaluation.test", "false")
    warm_train(*left_out)
    assert not (tried / "evaluation").exists()
    summary = json.loads((tried / "summary.json").read_text())
    assert summary["status"] == "finished" and not any(key.startswith("test") for key in summary)
    assert "is finished: the test images were not evaluated" in warm_train(*left_out).stderr
    warm_train(*flags(config, tried))
    of_both = [json.loads((folder / "summary.json").read_text()) for folder in (run, tried)]
    assert of_both[0]["test.top1"] == of_both[1]["test.top1"] and of_both[0]["val.top1"] == of_both[1]["val.top1"]
    assert same_weights(run, tried)


@pytest.mark.thorough
def test_the_same_command_twice_gives_the_same_bits(finished: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = finished
    warm_train(*flags(config, tmp_path / "again"))
    assert same_weights(run, tmp_path / "again")
    assert metrics(run) == metrics(tmp_path / "again")


def test_killed_in_mid_epoch_and_continued_it_ends_with_the_same_bits(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = finished
    killed = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags(config, killed))]
    child = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while max((killed / "checkpoints").glob("step_*"), default=Path()).name < "step_00000005":  # of 12, in mid-epoch
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (killed / "summary.json").exists()
    done = warm_train(*flags(config, killed))
    assert "resuming from" in done.stderr
    assert same_weights(run, killed)
    assert metrics(run) == metrics(killed)


@pytest.mark.thorough
def test_sigterm_saves_and_stops_and_the_same_command_continues(finished: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = finished
    stopped = tmp_path / "frozen"
    more = map(str, flags(config, tmp_path, "--checkpoint.every_steps", 0))
    command = [sys.executable, str(ROOT / "tests/inject.py"), "frozen", *more]  # stops itself in step 7
    child = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGCONT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["steps"] == 7 and summary["stopped_by"] == "SIGTERM"
    assert (stopped / "REQUEUE").exists()
    warm_train(*flags(config, stopped, "--checkpoint.every_steps", 0))
    assert not (stopped / "REQUEUE").exists()
    assert same_weights(run, stopped)


@pytest.mark.thorough
def test_two_processes_give_the_losses_of_one_with_accumulation(tmp_path: Path, small_config: Path) -> None:
    more = (
        "--batch.micro_batch_size",
        16,
        "--model.name",
        "mlp",
        "--model.options",
        "{}",
        "--evaluation.batch_size",
        77,
    )
    warm_train(*flags(small_config, tmp_path / "one", *more))
    warm_train(*flags(small_config, tmp_path / "two", *more), processes=2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 12 + 2 + 1  # train lines, validations, test
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["prefix"]) == (b["step"], b["prefix"])
        assert abs(a["loss"] - b["loss"]) < 1e-5, (a, b)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert [summary["world_size"] for summary in summaries] == [1, 2]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 1e-5


@pytest.mark.thorough
def test_two_processes_stop_at_the_same_step_and_one_goes_on_alone(tmp_path: Path, small_config: Path) -> None:
    more = ("--batch.micro_batch_size", 16, "--model.name", "mlp", "--model.options", "{}")
    warm_train(*flags(small_config, tmp_path / "whole", *more))
    train(*flags(small_config, tmp_path / "parts", *more, "--max_minutes", 0.001), processes=2)
    summary = json.loads((tmp_path / "parts/summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("stopped", 2)
    assert summary["steps"] == 2  # the limit is over at the first step; all processes agree at the second
    assert (tmp_path / "parts/REQUEUE").exists()
    warm_train(*flags(small_config, tmp_path / "parts", *more))
    assert json.loads((tmp_path / "parts/summary.json").read_text())["status"] == "finished"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 1e-5


@pytest.mark.thorough
@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path: Path, small_config: Path) -> None:
    plain = ("--model.drop_rate", 0)  # the compiler draws dropout's masks in its own way
    train(*flags(small_config, tmp_path / "plain", *plain))
    train(*flags(small_config, tmp_path / "compiled", *plain, "--model.compile", "true"))
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-2, (a, b)  # other rounding, twelve steps long
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled")]
    assert {key: t.shape for key, t in weights[0].items()} == {key: t.shape for key, t in weights[1].items()}


def copy_data(folder: Path) -> Path:
    folder.mkdir()
    source = locate()
    for name in FILES:
        plain, packed = source / name, source / f"{name}.gz"
        shutil.copy(plain if plain.exists() else packed, folder)
    return folder


def damaged_data(tmp_path: Path, kind: str) -> Path:
    folder = copy_data(tmp_path / "data")
    images, labels = (next(folder.glob(f"train-{part}*")) for part in ("images", "labels"))
    if kind == "missing":
        images.unlink()
    elif kind == "truncated":
        packed = images.read_bytes() if images.suffix == ".gz" else gzip.compress(images.read_bytes(), 1)
        images.unlink()
        (folder / f"{FILES[0]}.gz").write_bytes(packed[: len(packed) // 2])
    else:
        data = bytearray(gzip.decompress(labels.read_bytes()) if labels.suffix == ".gz" else labels.read_bytes())
        data[8 + 123] = 10
        labels.unlink()
        (folder / FILES[1]).write_bytes(data)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("missing", "train-images-idx3-ubyte"), ("truncated", "train-images-idx3-ubyte.gz"), ("label", "10")],
)
def test_damaged_data_is_one_line_and_nothing_is_written(
    kind: str, expected: str, tmp_path: Path, small_config: Path
) -> None:
    run = tmp_path / "run"
    done = warm_train(*flags(small_config, run, "--data.root", damaged_data(tmp_path, kind)), check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert expected in done.stderr
    assert not run.exists()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--optim.lrr", "3"], "did you mean optim.lr?"),
        (["--batch.micro_batch_size", "24"], "32 is not a multiple of micro_batch_size 24 x 1 process = 24"),
        (["--model.name", "cnnn"], "cnn"),
    ],
)
def test_mistakes_are_one_line_with_status_2(
    more: list[str], expected: str, tmp_path: Path, small_config: Path
) -> None:
    done = warm_train(*flags(small_config, tmp_path / "run", *more), check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_another_config_is_refused_by_name_and_the_run_is_left_alone(finished: tuple[Path, Path]) -> None:
    config, run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for more, expected in (
        (["--seed", 1], "seed was 0, now 1"),
        (["--optim.lr", 0.5], "optim.lr was 0.003, now 0.5"),
        (["--resume", "never"], "--overwrite true"),
    ):
        done = warm_train(*flags(config, run, *more), check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.thorough
def test_a_loss_that_is_not_finite_stops_with_one_line_and_saves_nothing_broken(
    tmp_path: Path, small_config: Path
) -> None:
    run = tmp_path / "run"
    more = ("--optim.name", "sgd", "--optim.lr", 100, "--optim.grad_clip_norm", 1e6, "--schedule.warmup_steps", 0)
    done = warm_train(*flags(small_config, run, *more, "--model.name", "mlp", "--model.options", "{}"), check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: error: ")
    assert "step" in done.stderr.splitlines()[-1]
    for path in run.glob("checkpoints/*/*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(path).values() if t.is_floating_point())


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    more = ("--model.name", "convnext_tiny", "--augment.size", 224, "--batch.micro_batch_size", 32)
    done = warm_train("--output_dir", tmp_path / "run", "--dry_run", *more, "--optim.ema_decay", 0)
    assert not (tmp_path / "run").exists()
    # ConvNeXt-Tiny: 28.6 M parameters with 1000 classes and three channels: 990 x 769 fewer in the head (27.83 M);
    # 8.89 GF forward (4.45 G multiply-adds) and three times that with backward, less the stem's image gradient.
    for part in ("27,8", "8.89 G", "26.66 G", "256 = 32 images x 1 process x 8 accumulation steps", "55,000 training"):
        assert part in done.stdout, done.stdout
