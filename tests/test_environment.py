"""What the environment decides: each variable is obeyed, without effect or refused, as docs/environment.md says."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, environment, execute, progress, train
from small import untrained
from test_tracker_faults import KEY, Server
from torch import nn

from fmnist.apps import doctor
from fmnist.config.same_run import differences
from fmnist.config.schema import Config, LogConfig, ModelConfig, check_values
from fmnist.evaluation.numbers import reliability_bins
from fmnist.report.figures import plot_reliability
from fmnist.report.grid import draw_grid
from fmnist.runtime import compute as compute_module
from fmnist.runtime import hardware, launcher
from fmnist.runtime.compute import Compute
from fmnist.runtime.console import one_line_errors
from fmnist.runtime.environment import (
    ENVIRONMENT,
    VARIABLES,
    check_allocators,
    hidden,
    integer,
    is_true,
    refused_by_a_library,
    remove_effects,
)
from fmnist.runtime.launcher import check_processes, check_world_size
from fmnist.tracking.tracker import Tracker
from fmnist.tracking.wandb_run import WANDB_ID_FILE, log_evaluation
from fmnist.trained import open_trained

LAUNCHED = (
    "WORLD_SIZE",
    "MASTER_ADDR",
    "TORCHELASTIC_RUN_ID",
    "OMP_NUM_THREADS",
    *launcher.INTEGERS,
    *launcher.STARTED,
)
# The step, and what it does to arithmetic when Accelerate is left to read it.
CHANGES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_DOWNCAST_BF16": "1",
    "ACCELERATE_CPU_AFFINITY": "1",
    "ACCELERATE_DEBUG_MODE": "maybe",  # which Accelerate itself would refuse
    "RANK": "1",
    "LOCAL_RANK": "-1",
    "MASTER_PORT": "tcp://10.0.0.1:80",  # as Kubernetes sets it for a service called master
}
WARNED = ("GRADIENT_ACCUMULATION_STEPS=4", "MIXED_PRECISION=bf16", "DYNAMO_BACKEND=EAGER", "TORCH_DEVICE=meta")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that no launcher, cluster or Accelerate file has touched."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "launcher_environment", lambda: None)
    monkeypatch.setattr(launcher, "launcher_environment", lambda: None)
    return monkeypatch


def test_the_page_says_what_each_variable_does() -> None:
    text = (ROOT / "docs/environment.md").read_text()
    table = text.partition("<!-- variables: begin -->\n")[2].partition("\n<!-- variables: end -->")[0]
    head, rows = table.splitlines()[:2], table.splitlines()[2:]
    assert head == ["| variable | | meaning |", "|---|---|---|"]
    found = [re.fullmatch(r"\| `([A-Z0-9_]+\*?)` \| (?:obeyed|no effect|refused) \| .* \|", row) for row in rows]
    names = [match[1] for match in found if match]
    assert len(names) == len(rows) == len(set(names))
    assert all(any(fnmatchcase(name, known) for known in VARIABLES) for name in names)
    assert set(VARIABLES) <= set(names)


def test_a_clone_needs_its_folder_on_the_path_of_modules() -> None:
    for folder, status in (None, 1), (ROOT, 0):  # the second as after `pip install .`
        found = environment() | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(folder or "")}
        done = execute(sys.executable, "train.py", "--help", env=found, cwd=ROOT)
        assert done.returncode == status, done.stderr
        assert ("No module named 'fmnist'" in done.stderr) == bool(status)


def test_what_is_read_is_in_the_table_and_nothing_else_can_be_read() -> None:
    readers = (
        "ENVIRONMENT.get",
        "environ.get",
        "own.get",
        "is_true",
        "integer",
        "set_default",
        "unset_empty",
        "hidden",
    )
    found = set()
    for path in (ROOT / "fmnist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in readers:
                found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    assert len(found) > 20
    assert [name for name in found if not any(fnmatchcase(name, known) for known in VARIABLES)] == []
    with pytest.raises(AssertionError, match="SECRET is not in the table"):
        ENVIRONMENT.get("SECRET")


def one_step() -> tuple[torch.Tensor, torch.Tensor, str, str]:
    with Compute(precision="fp32", seed=1, threads=1) as compute:  # last bits differ with their number
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        prepared, gradients = compute.prepare(model)
        images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
        for part in gradients.over(prepared, [slice(0, 4), slice(4, 8)]):
            gradients.backward(F.cross_entropy(prepared(images[part]), labels[part]))
        weight = model[1].weight
        assert weight.grad is not None
        return weight.grad.clone(), weight.detach().clone(), compute.precision, str(compute.device)


def test_nothing_set_for_accelerate_changes_a_gradient(
    alone: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = one_step()
    for name, value in CHANGES.items():
        alone.setenv(name, value)
    found = one_step()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])  # seen: a quarter
    assert found[2:] == expected[2:] == ("fp32", "cpu")
    assert {name: os.environ[name] for name in CHANGES} == CHANGES  # a notebook keeps its own
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert all(each in warning for each in WARNED)


@pytest.mark.parametrize("way", launcher.OTHER_WAYS)
def test_another_way_to_train_is_refused(way: str, alone: pytest.MonkeyPatch) -> None:
    alone.setenv(f"ACCELERATE_USE_{way}", "True")
    with pytest.raises(ValueError, match=f"^ACCELERATE_USE_{way} is true, .* DDP") as refused:
        Compute()
    assert "\n" not in str(refused.value)
    alone.setenv(f"ACCELERATE_USE_{way}", "false")
    assert check_processes() == 1


@pytest.mark.thorough
def test_the_whole_program_with_everything_that_is_inherited(tmp_path: Path) -> None:
    flags = ["--config", ROOT / "configs/mlp.yaml", "--log.wandb", "disabled", "--schedule.warmup_epochs", 0]
    flags += ["--schedule.steps", 60, "--optim.name", "sgd", "--optim.lr", 0.05, "--optim.ema_decay", 0]
    flags += ["--threads", 1]  # on some processors the last bits differ with their number
    train(*flags, "--output_dir", tmp_path / "plain")
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: black\nno.such.key: 3\n")
    inherited = CHANGES | {
        "PYTHONHASHSEED": "77",
        "PYTHONWARNINGS": "error",
        "PYTHONOPTIMIZE": "2",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TIMM_FUSED_ATTN": "0",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
        "COLUMNS": "20",
        "TQDM_DISABLE": "1",
        "FORK_LAUNCHED": "1",
    }
    command = [sys.executable, ROOT / "train.py", *flags, "--output_dir", tmp_path / "inherited"]
    done = execute(*command, env=environment() | inherited, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plain, found = tmp_path / "plain", tmp_path / "inherited"
    assert (found / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    # 71.72 % where it was recorded; a quarter of each gradient gave 44.59 %
    assert json.loads((found / "summary.json").read_text())["test.top1"] > 0.6
    assert (found / "evaluation/test/confusion_matrix.png").is_file()


# Who speaks, and whether processes meet


@pytest.mark.parametrize(
    "left_over",
    [
        {"RANK": "1"},
        {"LOCAL_RANK": "1"},
        {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "1"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "none"},
    ],
)
def test_an_error_is_always_shown(
    left_over: Mapping[str, str], alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in left_over.items():
        alone.setenv(name, value)
    with pytest.raises(SystemExit), one_line_errors("train.py"):
        raise ValueError("no")
    assert capsys.readouterr().err == "train.py: error: no\n"
    assert not launcher.is_sibling()


def test_an_error_of_several_processes_is_shown_once(
    alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port))):
        alone.setenv(name, value)
    for rank, text in (("1", "the same"), ("0", "the same"), ("2", "my own")):
        alone.setenv("RANK", rank)
        with pytest.raises(SystemExit), one_line_errors("train.py"):
            raise ValueError(text)
    assert capsys.readouterr().err == "train.py: error: the same\ntrain.py: error: my own\n"
    alone.setenv("RANK", "0")  # after a restart by torchrun it is news again
    alone.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit), one_line_errors("train.py"):
        raise ValueError("the same")
    assert capsys.readouterr().err == "train.py: error: the same\n"


@pytest.mark.thorough
def test_a_misspelt_flag_of_two_processes_is_one_line() -> None:
    done = train("--optim.lrr", 3, processes=2, check=False)
    assert done.stderr.count("train.py: error:") == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; valid: a whole number, 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'; valid: a whole number, 0 or more"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT is 'tcp://10.0.0.1:80'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, but MASTER_ADDR, where they meet, is not set"),
        ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "a"}, "RANK is 5, but WORLD_SIZE is 2; valid: 0 to 1"),
        ({"ACCELERATE_USE_FSDP": "maybe"}, "ACCELERATE_USE_FSDP is 'maybe'; valid: true or false"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "a", "GLOO_SOCKET_IFNAME": "eth77"},
            "GLOO_SOCKET_IFNAME is 'eth77': no such network interface; valid: .*lo",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "NCCL_SOCKET_IFNAME": "lo,eth77"}, "NCCL_SOCKET_IFNAME is"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "NCCL_SOCKET_IFNAME": "=l"}, "NCCL_SOCKET_IFNAME is '=l'"),
    ],
)
def test_what_no_process_can_use_is_named(values: Mapping[str, str], said: str, alone: pytest.MonkeyPatch) -> None:
    for name, value in values.items():
        alone.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        check_processes()


@pytest.mark.parametrize("name", ["lo", "l", "=lo", "^eth0", "eth77"])
def test_interfaces_that_are_there_or_not_asked_for(name: str, alone: pytest.MonkeyPatch) -> None:
    alone.setenv("NCCL_SOCKET_IFNAME", name)
    if name != "eth77":  # which one process does not need
        alone.setenv("WORLD_SIZE", "2")
        alone.setenv("MASTER_ADDR", "127.0.0.1")
    assert check_processes() == (1 if name == "eth77" else 2)


@pytest.mark.parametrize("name", ["WORLD_SIZE", *launcher.STARTED])
def test_processes_that_each_run_alone_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^2 processes were started \\({name}=2\\), but each runs alone: .*torchrun"):
        check_world_size(1, {name: "2"})
    check_world_size(1, {name: "1"})
    check_world_size(2, {name: "2"})


def test_accelerate_that_starts_one_of_several_is_refused(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(launcher, "launcher_environment", lambda: {"PATH": "/bin"})
    environ = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(ValueError, match="asked for several processes but started one"):
        check_world_size(1, environ)
    check_world_size(1, environ | {"TORCHELASTIC_RUN_ID": "none"})
    alone.setattr(launcher, "launcher_environment", lambda: {"MASTER_ADDR": "127.0.0.1"})
    check_world_size(1, environ)  # the user's own, left over


def test_a_long_wait_for_others_is_reported_and_ends_in_one_line(
    alone: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone.setattr(compute_module, "WAITING_S", 0.01)
    refused = pytest.raises(ValueError, match=r"^2 processes \(WORLD_SIZE\) cannot meet: timed out")
    with refused, compute_module._meeting(2):
        time.sleep(0.3)
        raise RuntimeError("timed out\nafter 600 s")
    assert caplog.messages == ["waiting for 1 more process (WORLD_SIZE=2)"]
    with compute_module._meeting(4):
        time.sleep(0.3)
    assert caplog.messages[1:] == ["waiting for 3 more processes (WORLD_SIZE=4)"]


# Threads


@pytest.mark.parametrize(
    ("values", "own", "expected"),
    [
        ({}, None, None),  # torch's own number
        ({"SLURM_CPUS_PER_TASK": "1"}, None, 1),
        ({"SLURM_CPUS_ON_NODE": "1"}, None, 1),
        ({"SLURM_CPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "2"}, None, None),
        ({"SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "2"}, None, None),  # as the user says
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, {}, 2),  # the launcher's 1
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, {"OMP_NUM_THREADS": "1"}, None),  # the user's 1
        ({"OMP_NUM_THREADS": "64", "ACCELERATE_MIXED_PRECISION": "no"}, {"HOME": "/"}, 2),  # the launcher's, of all
        ({"OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "1", "TORCHELASTIC_RUN_ID": "x"}, {"HOME": "/"}, 1),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, {"HOME": "/"}, 1),
    ],
)
def test_threads_are_at_most_what_the_job_was_given(
    values: Mapping[str, str], own: Mapping[str, str] | None, expected: int | None, alone: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        alone.setenv(name, value)
    chosen: list[int] = []
    alone.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    alone.setattr(torch, "get_num_threads", lambda: 2)
    alone.setattr(torch, "set_num_threads", chosen.append)
    alone.setattr(hardware, "launcher_environment", lambda: own)
    hardware.set_threads(None, 1)
    assert chosen == ([] if expected is None else [expected])
    hardware.set_threads(3, 1)  # the option is above all
    assert chosen[-1] == 3


def test_threads_are_no_part_of_a_run_and_exact_has_one(alone: pytest.MonkeyPatch) -> None:
    assert differences(Config(threads=1), Config(threads=8)) == []
    with pytest.raises(ValueError, match="threads is 4, but exact computes with one"):
        Compute(shards=2, threads=4)
    before = torch.get_num_threads()
    with Compute(precision="fp32", threads=1):
        assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(("own", "expected"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_the_other_commands_compute_with_the_threads_of_their_job_too(
    own: Mapping[str, str], expected: int, alone: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = untrained(tmp_path / "run", ModelConfig(name="mlp"), 28)
    alone.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    for name, value in {"SLURM_CPUS_PER_TASK": "1", **own}.items():
        alone.setenv(name, value)
    before = torch.get_num_threads()
    try:
        for use in (lambda: open_trained(run, "cpu"), lambda: list(doctor.check_device("cpu"))):
            torch.set_num_threads(2)
            use()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    for path in (ROOT / "fmnist/apps").rglob("*.py"):  # they find their device in one way
        assert "find_device" not in path.read_text(), path


@pytest.mark.thorough
@pytest.mark.parametrize("users", [None, "1"])
def test_the_users_thread_is_told_from_the_launchers(users: str | None, tmp_path: Path) -> None:
    script = tmp_path / "threads.py"
    script.write_text(
        "import os, torch\nfrom fmnist.runtime import hardware\nos.sched_getaffinity = lambda _: range(6)\n"
        "hardware.set_threads(None, 2)\n"
        "print(f\"threads {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}\\n\", end='')\n"
    )
    environ = environment()
    del environ["OMP_NUM_THREADS"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environ |= {"OMP_NUM_THREADS": users} if users else {}
    done = execute(*command, env=environ, timeout=120)
    assert done.stdout.count(f"threads {1 if users else 3} 1") == 2, done.stdout + done.stderr


# Weights & Biases


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A working server, with a key to it, and a client that has read nothing yet."""
    import wandb

    serving = Server("good")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{serving.server_address[1]}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield serving
    wandb.teardown()
    serving.stop()


def tracked(directory: Path, cfg: LogConfig) -> None:
    directory.mkdir(exist_ok=True)
    tracker = Tracker(directory, cfg, {"optim.lr": 0.1}, progress(0))
    tracker.log("train", {"loss": 1.0}, 1, 0.1)
    tracker.finish({})


@pytest.mark.parametrize(
    "values",
    [
        {"WANDB_MODE": "offline"},
        {"WANDB_MODE": "dryrun"},
        {"WANDB_MODE": "disabled"},
        {"WANDB_DISABLED": "true"},
        {"wandb/settings": "mode = offline"},
        {"wandb/settings": "mode = disabled"},
    ],
)
def test_wandb_is_as_quiet_as_it_is_told(
    values: Mapping[str, str], server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in values.items():
        if name == "wandb/settings":
            (tmp_path / "wandb").mkdir()
            (tmp_path / name).write_text(f"[default]\n{value}\n")
        else:
            monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    tracked(run, LogConfig())
    (run / WANDB_ID_FILE).write_text("abcd1234\n")
    log_evaluation(run, LogConfig(), {}, prefix="evaluation/test", scalars={"top1": 0.9}, files=[], errors=[])
    assert server.paths == []
    kept = list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(kept) == (2 if "offline" in str(values) or "dryrun" in str(values) else 0)


def sent(server: Server) -> dict[str, object]:
    bodies = [json.loads(body) for body in server.bodies if b"UpsertBucket" in body]
    return bodies[0]["variables"]


def test_wandb_gets_the_project_and_name_of_the_environment_and_nothing_of_the_machine(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "team")
    monkeypatch.setenv("WANDB_NAME", "first try")
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep")
    tracked(tmp_path / "run", LogConfig())
    found = sent(server)
    assert (found["project"], found["displayName"], found["groupName"]) == ("team", "first try", "sweep")
    assert (found["host"], found["program"], found["repo"], found["commit"]) == ("-", "fmnist", None, None)
    assert not any("requirements" in path or "metadata" in path for path in server.paths)
    everything = b"".join(server.bodies)
    for private in (os.uname().nodename, str(ROOT), str(tmp_path), sys.executable, f"torch=={torch.__version__}"):
        assert len(private) < 4 or private.encode() not in everything, private


def test_wandb_gets_what_the_config_says_first(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "team")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked(tmp_path / "mine", LogConfig(wandb="online", project="own"))
    assert (sent(server)["project"], sent(server)["displayName"]) == ("own", "mine")


@pytest.mark.thorough
def test_wandb_is_silent_without_a_home(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom fmnist.config.schema import LogConfig\nfrom fmnist.tracking.tracker import *\n"
        "progress = Progress(lambda: 0, lambda step: False, total_steps=1, steps_per_epoch=1)\n"
        "Tracker(Path('run'), LogConfig(wandb='offline'), {}, progress).finish({})\n"
    )
    (tmp_path / "run").mkdir()
    environ = {name: value for name, value in environment().items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = execute(sys.executable, "-c", code, env=environ, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb"))


# Figures

DRAW = """
import sys, torch
from pathlib import Path
from fmnist.evaluation.numbers import reliability_bins
from fmnist.report.figures import plot_reliability
torch.manual_seed(0)
plot_reliability(reliability_bins(torch.rand(50, 10).softmax(1), torch.arange(50) % 10), 0.1, "t", Path(sys.argv[1]))
"""


def draw(path: Path) -> bytes:
    torch.manual_seed(0)
    bins = reliability_bins(torch.rand(50, 10).softmax(1), torch.arange(50) % 10)
    plot_reliability(bins, 0.1, "t", path)
    return path.read_bytes()


def draw_pictures(path: Path) -> bytes:
    draw_grid(path, torch.zeros(3, 8, 8, 3), ["a", "b", "c"], "what the model trains on")
    return path.read_bytes()


@pytest.mark.thorough
def test_figures_are_those_of_matplotlibs_defaults(tmp_path: Path) -> None:
    expected = draw(tmp_path / "plain.png")
    rc = "axes.facecolor: black\nfont.size: 30\nno.such.key: 1\nbackend: module://nothing\nsavefig.dpi: 20\n"
    for folder in ("here", "config"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "matplotlibrc").write_text(rc)
    environ = environment() | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(tmp_path / "here" / "matplotlibrc"),
        "MPLCONFIGDIR": str(tmp_path / "config"),
    }
    done = execute(sys.executable, "-c", DRAW, tmp_path / "found.png", env=environ, cwd=tmp_path / "here", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "found.png").read_bytes() == expected


def test_figures_leave_a_notebooks_style_alone(tmp_path: Path) -> None:
    expected = [each(tmp_path / "plain.png") for each in (draw, draw_pictures)]
    changed = {"axes.facecolor": "black", "font.size": 30, "axes.grid": True, "font.family": "serif"}
    with matplotlib.rc_context(changed):
        assert [each(tmp_path / "found.png") for each in (draw, draw_pictures)] == expected
        assert matplotlib.rcParams["font.size"] == 30


# The rest


def test_values_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("True", True), ("1", True), (" yes ", True), ("false", False), ("", False), ("0", False)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
        assert is_true("ACCELERATE_USE_CPU") is expected
    with hidden("ACCELERATE_*"):
        assert "ACCELERATE_USE_CPU" not in os.environ
    assert os.environ["ACCELERATE_USE_CPU"] == "0"
    monkeypatch.setenv("FMNIST_EXPECTED_WORLD_SIZE", "\u0663")  # a digit, but not one of ours
    with pytest.raises(ValueError, match="valid: a whole number, 1 or more"):
        integer("FMNIST_EXPECTED_WORLD_SIZE", 1)


def test_the_cpu_is_taken_where_the_environment_asks_for_it(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    assert hardware.find_device(None) == torch.device("meta")
    alone.setenv("ACCELERATE_USE_CPU", "true")
    assert hardware.find_device(None) == torch.device("cpu")
    assert hardware.find_device("meta") == torch.device("meta")  # --device says it first


def test_what_would_change_arithmetic_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    gone: tuple[str, ...] = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TIMM_FUSED_ATTN")
    gone += ("TQDM_MININTERVAL", "TQDM_BAR_FORMAT", "TQDM_NCOLS")
    for name in (*gone, "TIMMY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_effects()
        warnings.warn("only said", stacklevel=1)
    assert not any(name in os.environ for name in gone)
    assert {"TIMMY", "TQDM_DISABLE"} <= set(os.environ)


# As torch and huggingface_hub do: what is read, the value, and a line of a module that fails on it.
READS = (
    ("SOME_TIMEOUT", "soon", "number = int(os.environ['SOME_TIMEOUT'])"),
    ("SOME_TIMEOUT", "x", "number = int(os.environ['SOME_TIMEOUT'])"),
    ("SOME_LOGS", "nonsense", "raise ValueError('\\ninvalid settings: nonsense, see SOME_LOGS=help\\nall, none')"),
    ("SOME_FILE", "/nope/x", "name = ''.join(('SOME', '_FILE')); open(os.environ[name])"),
)


@pytest.mark.parametrize(("name", "value", "code"), READS)
def test_a_value_that_a_library_cannot_read_is_named(
    name: str, value: str, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "site-packages"
    library.mkdir()
    (library / "some_library.py").write_text(f"import os\n{code}\n")
    monkeypatch.syspath_prepend(library)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTHER_TIMEOUT", "1")
    with pytest.raises((ValueError, OSError)) as caught:
        importlib.import_module("some_library")
    assert refused_by_a_library(caught.value, caught.tb) == f"{name} is {value!r}"
    monkeypatch.delenv(name)
    assert refused_by_a_library(caught.value, caught.tb) is None  # the library's own fault: its traceback is kept
    monkeypatch.setenv(name, value)
    assert refused_by_a_library(caught.value, None) is None  # and so is an error after the imports


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["TORCH_LOGS", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_whole_program_with_a_value_that_torch_cannot_read(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--output_dir", str(tmp_path / "run")]
    done = execute(*command, env=environment() | {name: "nonsense"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.match(f"train.py: error: {name} is 'nonsense'[:;] ", done.stderr)


# torch 2.14 ends by SIGABRT at each of the first row when it is imported, and begins with each of the second.
BAD_SETTINGS = ["nonsense", ",", "a:", ":1", "a:1,b", "a:1 b:2", "a:1:2", "a:[1:2", "[a:1]", "a=1", "a:,b:1"]
SETTINGS = ["", " ", "expandable_segments:True", " a : 1 ,", "a:-1,b:0.5", "a:[256:1,512:2,>:8],backend:native"]


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_settings_of_the_allocators_that_would_abort_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in BAD_SETTINGS:
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}; valid: NAME:VALUE,"):
            check_allocators()
    for value in SETTINGS:
        monkeypatch.setenv(name, value)
        check_allocators()


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_path_that_is_no_text_in_the_locale(locale: str, tmp_path: Path) -> None:
    environ = environment() | {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "fmnist", "launch", "--output_dir", "\u00fc/run"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, timeout=60)
    if locale == "C":
        assert done.returncode == 2
        assert re.search(rb"output_dir is .*: no text in this locale \(ascii\); set LC_ALL=C.UTF-8\n$", done.stderr)
        assert done.stderr.count(b"\n") == 1
    else:
        assert done.stdout.decode().strip() == str(tmp_path / "\u00fc" / "run")


def test_a_byte_that_is_no_text_is_refused_in_any_locale() -> None:
    with pytest.raises(ValueError, match="output_dir is .*: no text in this locale"):
        check_values(Config(output_dir="a\udcff"))


def test_the_process_that_stays_silent_lets_the_other_report_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends all when the first ends: the silent one must not be the first, and --help costs it nothing."""
    from fmnist.runtime import console

    waited: list[float] = []
    monkeypatch.setattr(console, "is_sibling", lambda: True)
    monkeypatch.setattr(console.time, "sleep", waited.append)
    for code, expected in ((2, [console.LINGER_S]), (0, [])):
        waited.clear()
        with pytest.raises(SystemExit), console.same_arguments():
            print("one line", file=sys.stderr)
            raise SystemExit(code)
        assert waited == expected
    assert capsys.readouterr().err == ""
