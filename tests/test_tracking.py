"""Numbers out: metrics.jsonl, the real Weights & Biases client offline, and that neither can stop a run."""

import json
import logging
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import progress
from PIL import Image

from fmnist.config.schema import LogConfig
from fmnist.tracking.tracker import Tracker, truncate_metrics
from fmnist.tracking.wandb_run import has_api_key, log_evaluation


def track(directory: Path, wandb: str = "disabled", step: int = 0) -> Tracker:
    return Tracker(directory, LogConfig(wandb=wandb), {"optim.lr": 0.1}, progress(step))


def stored_offline(run: Path, run_id: str) -> bytes:
    """Return what W&B's files of a run hold, once its service has ended: `finish` does not wait for the disk."""
    import wandb

    wandb.teardown()
    files = list((run / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files
    return b"".join(file.read_bytes() for file in files)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="fmnist")
    return caplog


def test_metrics_are_one_json_object_a_line(tmp_path: Path) -> None:
    tracker = track(tmp_path)
    tracker.log("train", {"loss": 1.5, "images_per_second": 100.0}, 2, 0.25)
    tracker.log("val", {"top1": float("nan")}, 4, 0.5)
    tracker.finish({})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 2, "epoch": 0.25, "prefix": "train", "loss": 1.5, "images_per_second": 100.0},
        {"step": 4, "epoch": 0.5, "prefix": "val", "top1": None},
    ]


def test_a_restart_drops_the_lines_after_its_checkpoint_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 3, "prefix": "test"}, {"step": 4}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    truncate_metrics(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_the_real_client_offline_keeps_its_run_id(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    tracker = track(tmp_path, "offline")
    tracker.log("train", {"loss": 1.0, "images_per_second": 5.0}, 1, 0.1)
    tracker.finish({"test.top1": 0.9})
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert "offline" in warnings.text
    again = track(tmp_path, "offline", step=1)
    assert again.wandb is not None
    assert again.wandb.id == run_id
    again.finish({})
    stored = stored_offline(tmp_path, run_id)
    for name in (b"train/loss", b"perf/images_per_second", b"optim.lr", b"test.top1"):
        assert name in stored


def test_auto_is_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_api_key()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert has_api_key()


def test_an_unreachable_server_costs_seconds_and_the_numbers_stay_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    start = time.monotonic()
    tracker = track(tmp_path, "auto")
    assert time.monotonic() - start < 25
    tracker.log("train", {"loss": 1.0}, 1, 0.1)
    tracker.finish({})
    assert "offline" in warnings.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    for path in tmp_path.rglob("*"):  # the key is nowhere in what the run wrote
        assert not path.is_file() or b"0123456789abcdef0123" not in path.read_bytes(), path


def test_a_tracker_that_raises_is_left_behind_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = track(tmp_path, "offline")
    for step in (1, 2):
        tracker.log("train", {"loss": 1.0}, step, 0.1)
    tracker.finish({})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert sum("off from here" in record.message for record in warnings.records) == 1


def test_an_evaluation_joins_the_run_and_its_failure_is_one_line(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "confusion_matrix.png"
    Image.new("L", (20, 20), 200).save(picture)
    rows = [{"picture": np.zeros((28, 28), np.uint8), "index": 7, "label": "Shirt", "prediction": "Coat"}]
    directory = tmp_path / "run"
    directory.mkdir()

    def log(cfg: LogConfig) -> None:
        log_evaluation(
            directory, cfg, {"seed": 0}, prefix="evaluation/test", scalars={"top1": 0.9}, files=[picture], errors=rows
        )

    log(LogConfig(wandb="offline"))  # no W&B run: nothing to join
    assert not (directory / "wandb").exists()
    (directory / "wandb_run_id").write_text("abcd1234\n")
    log(LogConfig(wandb="disabled"))
    assert not (directory / "wandb").exists()
    log(LogConfig(wandb="offline"))
    stored = stored_offline(directory, "abcd1234")
    for name in (b"evaluation/test/confusion_matrix", b"evaluation/test/errors", b"evaluation/test/top1"):
        assert name in stored
    (table,) = (directory / "wandb").glob("offline-run-*/files/media/table/evaluation/test/errors*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["picture", "index", "label", "prediction"]
    assert content["data"][0][1:] == [7, "Shirt", "Coat"]

    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    log(LogConfig(wandb="offline"))
    assert warnings.records[-1].message.startswith("Weights & Biases has no evaluation")
