"""What is run where a GPU is at hand, dry: every command of every stage ends well on a CPU, made tiny."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, execute

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("stage", "commands"),
    [("check", 9), ("kernels", 3), ("ladder", 1), ("large", 2), ("data", 1), ("recipes", 7), ("wide", 1)],
)
def test_a_stage_runs_dry(stage: str, commands: int, tmp_path: Path) -> None:
    environment = os.environ | {"DRY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = execute("bash", ROOT / "experiments/gpu.sh", stage, tmp_path, env=environment, timeout=None)
    found = re.findall(r"^=== (\w+): exit status (\d+),", done.stdout, re.M)
    assert [name for name, status in found if status != "0"] == [], done.stdout[-3000:]
    assert len(found) == commands
    compared = re.findall(r"^\w+ \w+: [0-9a-f]+ [0-9a-f]+ (\w+)$", done.stdout, re.M)
    assert compared == (["equal"] * 3 if stage == "check" else [])
    with tarfile.open(tmp_path / f"{stage}.tgz") as kept:
        assert len([name for name in kept.getnames() if name.endswith(".txt")]) >= commands


def test_a_stage_that_is_none_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(["bash", ROOT / "experiments/gpu.sh", "all", tmp_path], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr == "all is no stage: check, kernels, ladder, large, data, recipes or wide\n"
    )
