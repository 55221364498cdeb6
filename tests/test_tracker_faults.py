"""Weights & Biases at its worst, with the real client and real processes: the training result never changes."""

import gzip
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from conftest import SMALL_RUN, metrics, progress, train, warm_train

from fmnist.config.schema import LogConfig
from fmnist.runtime.probe import answers
from fmnist.tracking import wandb_run
from fmnist.tracking.tracker import Tracker
from fmnist.tracking.wandb_run import _run_id, has_api_key, without_secrets

KEY = "0123456789abcdef" * 2 + "01234567"
RUN = {
    "id": "UnVu",
    "name": "run",
    "displayName": "run",
    "description": "",
    "config": "{}",
    "sweepName": None,
    "historyLineCount": 0,
    "project": {"id": "cA==", "name": "fmnist", "entity": {"id": "ZQ==", "name": "nobody"}},
}


class Server(http.server.ThreadingHTTPServer):
    """A server with as much of W&B's interface as a run needs; `kind` says how it fails."""

    daemon_threads = True

    def __init__(self, kind: str) -> None:
        self.kind, self.paths, self.bodies = kind, list[str](), list[bytes]()
        self.streamed = threading.Event()
        self.over = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.paths.append(self.path)
                server.bodies.append(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
                if server.kind == "hangs":
                    server.over.wait(60)
                elif server.kind == "bad key":
                    self.reply(401, {"errors": [{"message": "unauthorized"}]})
                elif server.kind == "dies" and server.streamed.is_set():
                    self.close_connection = True
                elif "file_stream" in self.path:
                    server.streamed.set()
                    self.reply(200, {})
                elif b"UpsertBucket" in body:
                    self.reply(200, {"data": {"upsertBucket": {"bucket": RUN, "inserted": True}}})
                elif b"CreateRunFiles" in body:
                    names = json.loads(body)["variables"]["files"]
                    host = f"http://127.0.0.1:{server.server_address[1]}"
                    files = [{"name": name, "uploadUrl": f"{host}/upload/{name}"} for name in names]
                    self.reply(200, {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}})
                else:
                    self.reply(200, {"data": {"model": {"bucket": None}, "viewer": {"id": "dg==", "entity": "nobody"}}})

            def do_PUT(self) -> None:
                server.paths.append(self.path)
                server.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                self.reply(200, {})

            def reply(self, status: int, content: object) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *args: object) -> None:
        """Clients that give up are what these tests are about."""

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Server | socket.socket | None]]:
    """Make W&B's server a local one of a kind, with a key to it."""
    opened: list[Server | socket.socket] = []
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def start(kind: str) -> Server | socket.socket | None:
        if kind in ("refused", "silent"):
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            if kind == "refused":
                listener.close()
            else:
                listener.listen(50)  # the system accepts; nobody ever answers
                opened.append(listener)
        else:
            opened.append(Server(kind))
            port = opened[-1].server_address[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        return opened[-1] if opened else None

    yield start
    for server in opened:
        server.stop() if isinstance(server, Server) else server.close()


@pytest.fixture(scope="module")
def disabled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An unbroken run with --log.wandb disabled, and its config."""
    folder = tmp_path_factory.mktemp("disabled")
    (folder / "small.yaml").write_text(SMALL_RUN)
    warm_train("--config", folder / "small.yaml", "--output_dir", folder / "run")
    return folder / "small.yaml", folder / "run"


def assert_same_result(run: Path, expected: Path) -> None:
    assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert metrics(run) == metrics(expected)
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def start_delay_s(run: Path) -> float:
    """Seconds from config.yaml, which is written just before the tracker starts, to the tracker's own line."""
    line = [line for line in (run / "train.log").read_text().splitlines() if "Weights & Biases" in line][-1]
    started = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    return started - (run / "config.yaml").stat().st_mtime


def offline_files(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param("refused", "does not answer: offline", marks=pytest.mark.slow),
        pytest.param("silent", "does not answer: offline", marks=pytest.mark.slow),
        ("hangs", "cannot be used"),
        pytest.param("bad key", "cannot be used", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_cannot_be_used(
    kind: str, said: str, serve: Callable[[str], object], disabled: tuple[Path, Path], tmp_path: Path
) -> None:
    serve(kind)
    config, expected = disabled
    done = train("--config", config, "--output_dir", tmp_path / "run", "--log.wandb", "auto")
    assert_same_result(tmp_path / "run", expected)
    assert start_delay_s(tmp_path / "run") < 20  # 5 s of waiting for the server, and W&B's imports; its own limit is 90
    # On a busy machine even a local server may not answer in time.
    assert said in done.stderr or "does not answer: offline" in done.stderr
    assert KEY not in done.stderr
    # All numbers are kept for `wandb sync`.
    assert b"train/grad_norm" in offline_files(tmp_path / "run")[0].read_bytes()


@pytest.mark.thorough
def test_a_server_that_dies_in_mid_run(
    serve: Callable[[str], Server], disabled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve("dies")
    config, expected = disabled
    start = time.monotonic()
    done = train("--config", config, "--output_dir", tmp_path / "run", "--log.wandb", "online")
    assert server.streamed.is_set(), server.paths  # it had worked
    assert "online, run" in done.stderr
    assert time.monotonic() - start < wandb_run.FINISH_TIMEOUT_S + 60
    assert_same_result(tmp_path / "run", expected)
    assert b"test/top1" in next((tmp_path / "run").glob("wandb/run-*/run-*.wandb")).read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("may not mount a disk here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            return


def stopped_run(config: Path, run: Path) -> None:
    warm_train("--config", config, "--output_dir", run, "--max_minutes", 0.0011)
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"


@pytest.mark.thorough
def test_a_full_disk_below_wandb(small_disk: Path, disabled: tuple[Path, Path], tmp_path: Path) -> None:
    config, expected = disabled
    run = tmp_path / "run"
    stopped_run(config, run)
    fill(small_disk)
    (run / "wandb").symlink_to(small_disk)
    train("--config", config, "--output_dir", run, "--log.wandb", "offline")
    assert_same_result(run, expected)
    assert start_delay_s(run) < 10


@pytest.mark.thorough
@pytest.mark.slow
def test_no_folder_for_wandb_and_none_for_the_numbers(disabled: tuple[Path, Path], tmp_path: Path) -> None:
    config, expected = disabled
    run = tmp_path / "run"
    stopped_run(config, run)
    (run / "wandb").write_text("a file")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    done = train("--config", config, "--output_dir", run, "--log.wandb", "offline")
    assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert done.stderr.count("metrics.jsonl: further numbers are not written") == 1
    assert "Traceback" not in done.stderr
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


@pytest.mark.thorough
@pytest.mark.slow
def test_offline_and_resumed(disabled: tuple[Path, Path], tmp_path: Path) -> None:
    config, expected = disabled
    run = tmp_path / "run"
    train("--config", config, "--output_dir", run, "--log.wandb", "offline", "--max_minutes", 0.0011)
    run_id = (run / "wandb_run_id").read_text()
    train("--config", config, "--output_dir", run, "--log.wandb", "offline")
    assert_same_result(run, expected)
    assert start_delay_s(run) < 10
    assert (run / "wandb_run_id").read_text() == run_id
    files = offline_files(run)
    assert len(files) == 2
    assert {file.name for file in files} == {f"run-{run_id.strip()}.wandb"}


def test_numbers_on_a_full_disk_are_whole_lines_or_none(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(small_disk, LogConfig(wandb="disabled"), {}, progress(0))
    tracker.log("train", {"loss": 1.0}, 1, 0.1)
    fill(small_disk)
    for step in range(2, 400):  # the rest of the file's last page of 4 KiB holds some of them
        tracker.log("train", {"loss": 1.0}, step, 0.1)
    (small_disk / "filler").unlink()
    tracker.log("train", {"loss": 1.0}, 400, 0.1)
    tracker.finish({})
    text = (small_disk / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    kept = len(steps) - 1
    assert 1 <= kept < 399  # 399 lines of 55 bytes do not fit in one page
    assert steps == [*range(1, kept + 1), 400]
    assert text.endswith("}\n")
    assert sum("further numbers are not written" in record.message for record in caplog.records) == 1


def test_a_server_that_is_asked(serve: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, expected in (("refused", False), ("bad key", True), ("silent", False)):
        serve(kind)
        start = time.monotonic()
        assert answers(os.environ["WANDB_BASE_URL"], wandb_run.PROBE_TIMEOUT_S) is expected
        assert time.monotonic() - start < wandb_run.PROBE_TIMEOUT_S + 1
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    start = time.monotonic()
    assert not answers("http://wandb.invalid", 0.3)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("machine api.wandb.ai login user password " + KEY, True),
        ("machine wandb.example.org login user password " + KEY, True),
        ("machine my.server login user password " + KEY, True),  # the one that WANDB_BASE_URL names
        ("machine other.server login user password x", False),
        ("machine", False),
        ("\xff\xfe", False),
        ("", False),
    ],
)
def test_a_key_in_netrc(text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_bytes(text.encode("latin-1"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://my.server:8080")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert has_api_key() is expected


def test_an_error_is_told_without_its_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    error = RuntimeError(f"POST http://user:password@proxy:3128/graphql\nwith {KEY}: no")
    assert without_secrets(error) == "POST http://***@proxy:3128/graphql with ***: no"


@pytest.mark.parametrize("content", ["", "a/b", "x" * 65, "\xff"])
def test_a_damaged_run_id_is_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "wandb_run_id").write_bytes(content.encode("latin-1"))
    tracker = Tracker(tmp_path, LogConfig(wandb="offline"), {}, progress(0))
    assert tracker.wandb is not None
    tracker.finish({})
    assert re.fullmatch(r"[0-9a-f]{8}\n", (tmp_path / "wandb_run_id").read_text())
    shutil.rmtree(tmp_path / "wandb")


def test_a_sweeps_run_id_is_taken_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "sweep-17")
    assert _run_id(tmp_path / "wandb_run_id") == "sweep-17"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert _run_id(tmp_path / "wandb_run_id") == "sweep-17"  # a restart outside the sweep goes on with it
