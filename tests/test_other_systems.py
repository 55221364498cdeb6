"""Other systems, as far as they can be had on this one: names that Windows or macOS lack, a device without float64."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, execute

from fmnist.metrics import score
from fmnist.runtime import hardware
from fmnist.runtime.processes import Processes
from fmnist.runtime.stop_vote import STOP_SIGNALS

# Libraries come first: what they do elsewhere is theirs, and they ask sys.platform.
ABSENT = """
import os, signal, sys
import accelerate.state, huggingface_hub, matplotlib.figure, numpy, PIL.Image, safetensors.torch, scipy, sklearn.metrics
import timm.utils, torch.distributed, torch.fx.experimental.symbolic_shapes, wandb
for name in [name for name in sys.modules if name.split(".")[0] == "filelock"]:
    del sys.modules[name]
sys.modules |= dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios", "tty"))
for module, names in (
    (signal, "SIGUSR1 SIGUSR2 SIGHUP SIGALRM SIGKILL SIGQUIT pthread_kill"),
    (os, "sched_getaffinity sched_setaffinity O_NOFOLLOW O_CLOEXEC O_DIRECTORY fork forkpty geteuid getuid uname"),
    (os, "fchmod mkfifo register_at_fork getpgid killpg setsid fdatasync getloadavg"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""
TRAIN = """
import fmnist
options = {"schedule.steps": 2, "schedule.warmup_epochs": 0, "log.wandb": "disabled", "output_dir": sys.argv[1]}
run = fmnist.train("configs/mlp.yaml", **options)
assert run.summary["status"] == "finished", run.summary
assert len(run.predict(torch.zeros(2, 28, 28, dtype=torch.uint8))) == 2
print("trained", run.evaluate("val")["num_images"])
"""


@pytest.mark.thorough
def test_a_run_needs_no_name_that_another_system_lacks(tmp_path: Path) -> None:
    done = execute(sys.executable, "-c", ABSENT + TRAIN, tmp_path / "run", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "trained 5000"


def test_importing_the_package_and_its_door_needs_none_of_them() -> None:
    light = ABSENT.replace("import accelerate", "pass #").replace("import timm", "pass #")
    code = light + "import fmnist.__main__ as door\nfrom fmnist.runtime.console import open_door\n"
    code += "open_door('x')\nprint(door.usage())"
    done = execute(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fmnist")


def test_cores_and_signals_where_the_system_has_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(STOP_SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert hardware.available_cores() == 6


class OnApple(torch.Tensor):
    """A tensor that has no float64 until it is on the host, as on MPS."""

    def double(self) -> torch.Tensor:  # type: ignore[override]
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


def test_sums_are_exact_without_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 10
    scalars = {"loss": torch.tensor(0.1), "grad_norm": torch.tensor(3.3)}
    alone = Processes(0, 1)
    expected = alone.mean(score(logits, labels)), alone.mean(scalars)
    apples = {name: value.as_subclass(OnApple) for name, value in scalars.items()}
    with pytest.raises(TypeError, match="float64"):
        alone.mean(apples)
    monkeypatch.setattr(hardware, "NO_FLOAT64", ("cpu",))
    assert alone.mean(apples) == expected[1]
    assert alone.mean(score(logits.as_subclass(OnApple), labels)) == expected[0]
