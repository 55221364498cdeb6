"""What a run computes on: memory that is kept, threads that are taken back, precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from fmnist.runtime import provenance
from fmnist.runtime.console import counted
from fmnist.runtime.hardware import describe_device, make_deterministic, resolve_precision, seed_generators, set_threads
from fmnist.runtime.provenance import processor

FAULTS = """
import resource, sys, torch
from fmnist.runtime.hardware import keep_freed_memory
keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)  # 80 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_large_tensor_soon_takes_the_memory_of_those_before() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200  # 80 MB are 19,532 pages of 4 kB; each would be a fault where the memory is new


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}, "all"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "all"),
        ({"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4096"}, 1),
        ({"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "3"}, "as it was"),  # the user's own number
        ({}, "as it was"),  # no launcher
    ],
)
def test_cores_are_taken_back_from_launchers(
    environ: dict[str, str], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    set_threads(None, 1)
    wanted = {"all": [len(os.sched_getaffinity(0))], "as it was": [], 1: [1]}
    assert chosen == wanted[expected]


def test_precision_is_what_was_asked_for_or_what_the_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (resolve_precision("fp32", gpu), resolve_precision("bf16", cpu)) == ("fp32", "bf16")
    for supported, expected in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=supported, **_: answer)
        assert resolve_precision("auto", gpu) == expected
        assert resolve_precision("auto", cpu) == "fp32"  # of a machine that has a GPU as well


def test_exact_allows_deterministic_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own, which does as well
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    make_deterministic(torch.device("cpu"))
    assert not torch.utils.deterministic.fill_uninitialized_memory  # which would cost an eighth of a step
    assert calls == [True, 1]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_commit_of_a_repository_around_us_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where fmnist is installed into a virtual environment inside somebody's repository."""
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *command], check=True)
    (tmp_path / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.git_revision() == "unknown"
    subprocess.run(["git", "-C", tmp_path, "add", "provenance.py"], check=True)
    assert provenance.git_revision().endswith("-dirty")  # it is theirs now


def test_names_for_people() -> None:
    assert describe_device(torch.device("cpu")).startswith("CPU (")
    assert counted(torch.get_num_threads(), "thread") in describe_device(torch.device("cpu"))
    assert processor()


def test_a_seed_draws_what_torchs_own_does_and_formats_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(2**63 - 1)
    expected = torch.rand(9), torch.rand(9, device=device)
    formatted: list[object] = []
    monkeypatch.setattr("traceback.format_stack", lambda *_: formatted.append(1) or [])
    seed_generators(2**63 - 1, device)
    assert torch.equal(torch.rand(9), expected[0])
    if device.type != "cpu":
        assert torch.equal(torch.rand(9, device=device), expected[1])
    assert not formatted
