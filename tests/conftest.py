"""What several tests share: real images, and a way to run the two commands as a user does."""

import gzip
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from warm import run_program

from fmnist.data.fashion_mnist import load_split
from fmnist.data.fetch import DEBIAN_FOLDER, PUBLISHED, find_file
from fmnist.data.find import locate
from fmnist.data.split import Split
from fmnist.tracking.metrics_file import PERF_KEYS
from fmnist.tracking.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
# A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP; children would inherit that.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)
# A run of 12 steps on real images that takes a few seconds, with everything on that could break exactness.
SMALL_RUN = """
data: {val_size: 1000}
batch: {global_batch_size: 32}
augment: {size: 28, flip: 0.5, rotation: 10, shift: 0.1, scale: 0.1, erase: 0.25, mixup_alpha: 0.2, cutmix_alpha: 1.0}
model: {name: cnn, drop_rate: 0.2, options: {widths: [8, 16, 32]}}
optim: {lr: 0.003, label_smoothing: 0.1, ema_decay: 0.9, grad_clip_norm: 1.0}
schedule: {steps: 12, warmup_steps: 2}
evaluation: {every_steps: 6}
checkpoint: {every_steps: 1}
log: {every_steps: 1, wandb: disabled}
"""


def progress(step: int = 0) -> Progress:
    """What people see of a run of two epochs of five steps that stands at `step`."""
    return Progress(lambda: step, lambda number: number % 5 == 0, total_steps=10, steps_per_epoch=5)


def _reset_logging() -> None:
    logger = logging.getLogger("fmnist")
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    """Take away the handlers that an entry point called in this process leaves."""
    _reset_logging()
    yield
    _reset_logging()


@pytest.fixture(scope="module", autouse=True)
def accelerate_afresh() -> Iterator[None]:
    """Let each file have its own device and precision, whatever the one before left open."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def train_images(real_folder: Path) -> Split:
    """The first 2,000 training images on the CPU: uint8 [2000, 28, 28]."""
    images, labels = load_split("train", str(real_folder), 5000)
    return Split(images=images[:2000], labels=labels[:2000])


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The folder of the real data; fetched into data/ of the repository if this machine has none."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return locate(fetch=True)
    finally:
        os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def data_for_every_directory(real_folder: Path) -> None:
    """Name the folder where tests and their children may run in any directory; Debian's is found from all of them."""
    if real_folder != DEBIAN_FOLDER:
        os.environ.setdefault("FMNIST_DATA", str(real_folder))


@pytest.fixture(scope="session")
def packed(real_folder: Path) -> dict[str, bytes]:
    """The four real files as .gz, by name."""
    paths = {name: find_file(real_folder, name) for name in PUBLISHED}
    content = {name: path.read_bytes() for name, path in paths.items() if path}
    return {name: data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 1) for name, data in content.items()}


@pytest.fixture
def no_data_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide the caller's data folder, $FMNIST_DATA and proxy from a test, and leave none of its files behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FMNIST_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield
    monkeypatch.undo()
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the first images of train and test."""
    from small import write_small_data  # late: timm takes seconds

    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def small_data(data: Path) -> Iterator[Path]:
    """The same, as $FMNIST_DATA of a whole file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMNIST_DATA", str(data))
        yield data


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Trainings in forks of a process that has imported everything."""
    started = Forks()
    yield started
    started.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute with one: how a sum is cut among threads is part of its bits, and small layers only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL_RUN)
    return path


def environment() -> dict[str, str]:
    """The environment of a child: one thread a process, so that two of them on two cores keep their arithmetic."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "",
        "ACCELERATE_USE_CPU": "true",
    }


def execute(
    *words: object, env: Mapping[str, str] | None = None, timeout: float | None = 300, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, in a child's environment where no other is given, and keep what it prints."""
    env = environment() if env is None else env
    return subprocess.run([*map(str, words)], capture_output=True, text=True, env=env, timeout=timeout, **kwargs)


def train(
    *args: object,
    processes: int = 1,
    check: bool = True,
    script: Path = ROOT / "train.py",
    on_cpu: bool = True,
    **kwargs: Any,
) -> subprocess.CompletedProcess[str]:
    """Run train.py, or a script like it, with these flags, through torchrun where there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = environment() | {"ACCELERATE_USE_CPU": str(on_cpu).lower()}
    done = execute(*launcher, script, *args, env=env, **kwargs)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def warm_train(
    *args: object, processes: int = 1, check: bool = True, script: Path = ROOT / "train.py"
) -> subprocess.CompletedProcess[str]:
    """Do as `train`, in forks of a process that has imported everything: for tests that need many starts."""
    done = run_program(script, *args, env=environment(), processes=processes)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in PERF_KEYS} for line in lines]


torch.set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
