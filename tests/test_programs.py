"""fmnist benchmark programs: what timm's programs print, what is made of it, and one race with train.py itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import FashionMNIST

from fmnist.benchmark import programs
from fmnist.benchmark.__main__ import main

ROOT = Path(__file__).resolve().parent.parent

# As timm 1.0.29 prints it; the last line of the second epoch counts, and its mean, the second of the two rates.
PRINTED = """\
Train: 0 [  19/20 (100%)]  Loss: 2.08 (2.21)  Time: 4.744s,   53.97/s  (2.061s,  124.20/s)  LR: 1.000e-05
Test: [   0/0]  Time: 1.277 (1.277)  Loss:   2.059 ( 2.059)  Acc@1:  31.641 ( 31.641)  Acc@5:  71.875 ( 71.875)
Train: 1 [   0/20 (  5%)]  Loss: 2.10 (2.10)  Time: 4.168s,   61.42/s  (4.168s,   61.42/s)  LR: 2.800e-05
Train: 1 [  19/20 (100%)]  Loss: 1.66 (1.83)  Time: 1.163s,  220.04/s  (2.359s,  108.52/s)  LR: 2.800e-05
"""
TIMMS = f"""
import pathlib, sys
arguments = dict(zip(sys.argv, sys.argv[1:]))
assert pathlib.Path("timm/version.py").exists(), "it runs where it lies"
raw = pathlib.Path(arguments["--data-dir"]) / "FashionMNIST/raw"
assert len((raw / "train-images-idx3-ubyte").read_bytes()) == 16 + 8 * 28 * 28
assert arguments["--batch-size"] == "4" and arguments["--input-size"] == "1" and arguments["--model"] == "convnext_atto"
print({PRINTED!r})
"""
BENCHMARKS = """
import json, pathlib, sys
arguments = dict(zip(sys.argv, sys.argv[1:]))
pathlib.Path(arguments["--results-file"]).write_text(json.dumps({"model": "m", "train_samples_per_sec": 54.26}))
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "timm"
    (folder / "timm").mkdir(parents=True)
    (folder / "timm/version.py").write_text("__version__ = '1.0.29.dev0'\n")
    (folder / "train.py").write_text(TIMMS)
    (folder / "benchmark.py").write_text(BENCHMARKS)
    return folder


@pytest.mark.thorough
def test_a_race_with_train_py_itself(sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fmnist", "benchmark", "programs", str(sources), "--batch", "4", "--steps", "2"]
    command += ["--rounds", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    ours, timms, benchmark = result["rows"]
    assert (timms["median"], timms["ratio"], benchmark["median"], benchmark["ratio"]) == (108.52, 1.0, 54.26, 0.5)
    assert ours["median"] > 0 and ours["ratio"] == ours["median"] / 108.52 and len(ours["rounds"]) == 2
    assert ours["min"] <= ours["median"] <= ours["max"] < 1e5 and ours["seconds"] > 1
    assert result["timm_sources"] == "1.0.29.dev0" and result["batch_size"] == 4 and result["precision"] == "fp32"
    assert str(tmp_path) not in json.dumps(result["rows"]) and sys.executable not in json.dumps(result)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("train.py ")] == ["train.py"]
    assert {path.name for path in tmp_path.iterdir()} == {"timm", "out.json", "out.txt"}  # no images, no run is left


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("raise RuntimeError('no such model')", "exit status 1: RuntimeError: no such model"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9: no output"),
        ("print('done')", "says no images/s: done"),
        ("print('leaves nothing')", "says no images/s: leaves nothing"),
        ("print('rate 0')", "says no images/s: rate 0"),
    ],
)
def test_a_program_that_fails_is_one_row(says: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(says)
    (tmp_path / "works.py").write_text(f"print({PRINTED!r})")

    def rate(text: str) -> float | None:
        if "leaves nothing" in text:
            return float((tmp_path / "absent.json").read_text())
        return 0.0 if "rate 0" in text else 8.0 if "108.52" in text else None

    racing = [programs.Program(name, [sys.executable, f"{name}.py"], tmp_path, rate) for name in ("fails", "works")]
    fails, works = programs.race(racing, 2, tmp_path / "log.txt")
    assert fails == {"name": "fails", "failed": reason}
    assert works["median"] == 8 and len(works["rounds"]) == 2 and "ratio" not in works  # timm's train.py is not there
    assert (tmp_path / "log.txt").read_text().count("108.52") == 2


def test_torchvision_reads_the_images_that_timm_is_given(tmp_path: Path) -> None:
    images = torch.arange(3 * 28 * 28).remainder(251).to(torch.uint8).view(3, 28, 28)
    programs.write_torchvision(tmp_path, images.numpy(), torch.tensor([7, 0, 9]).numpy())
    for train in True, False:
        read = FashionMNIST(str(tmp_path), train=train)
        assert torch.equal(read.data, images) and read.targets.tolist() == [7, 0, 9]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: TIMM"),
        (["absent"], "absent"),
        (["."], ". holds no train.py: it is not a checkout of timm's sources"),
        (["timm", "--size", "4"], "valid range: 8 to 512"),
        (["timm", "--batch", "8192"], "--batch times --steps is 163,840 images; valid range: 1 to 30,000"),
        (["timm", "--output", "foreign"], "foreign.json was not made by this command"),
        (["timm", "--output", "notes"], "notes.txt was not made by this command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv: list[str], words: str, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sources.parent)
    Path("foreign.json").write_text("{}")
    Path("notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["programs", *argv])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert len(said.err.splitlines()) == 1 and words in said.err
    assert said.err.startswith("fmnist benchmark programs: error: ")
    assert {path.name for path in sources.parent.iterdir()} == {"timm", "foreign.json", "notes.txt"}
    assert Path("notes.txt").read_text() == "mine"
