"""One door: every command by name, answers before torch is imported, and the same from a wheel."""

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, environment, execute
from small import NUM_TEST, command, untrained, write_small_data

from fmnist.__main__ import COMMANDS
from fmnist.apps import doctor
from fmnist.apps.doctor import Line
from fmnist.apps.doctor import main as doctor_main
from fmnist.apps.launch import main as launch_main
from fmnist.benchmark import command_line as benchmark_options
from fmnist.config.schema import ModelConfig
from fmnist.config.shipped import find_recipe, shipped
from fmnist.evaluation import options as evaluation_options
from fmnist.runtime.launcher import check_alone

HEAVY = ("torch", "scipy", "matplotlib", "sklearn", "timm", "accelerate", "wandb")
SECONDS = 1.0  # of processor time, so that a busy machine does not count


def ask(*args: object, cwd: Path = ROOT) -> tuple[int, str, float]:
    """Run `python -m fmnist`; return the status, what it said, and its processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys, runpy, atexit; atexit.register(lambda: print('heavy:', *"
        f"sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)); runpy.run_module('fmnist', run_name='__main__')"
    )
    done = execute(sys.executable, "-c", code, *args, cwd=cwd, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    *said, heavy = (done.stdout + done.stderr).splitlines()
    assert heavy == "heavy:", heavy
    return done.returncode, "\n".join(said), seconds


def test_help_lists_every_command_with_one_line() -> None:
    status, said, seconds = ask("--help")
    assert status == 0 and seconds < SECONDS
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    listed = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in COMMANDS}
    assert listed == {name: text for name, (_, text) in COMMANDS.items()}
    assert max(map(len, said.splitlines())) <= 100
    assert ask()[0] == 2
    status, said, _ = ask("predcit")
    assert (status, said) == (
        2,
        "fmnist: error: unknown command predcit (did you mean predict?); fmnist --help lists all",
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_before_torch(name: str) -> None:
    status, said, seconds = ask(name, "--help")
    assert status == 0 and seconds < SECONDS
    assert said.startswith("usage: ") and len(said) > 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "--schedule.epoch", 1), "did you mean schedule.epochs?"),
        (("train", "--config", "nowhere.yaml"), "nowhere.yaml"),
        (("launch", "--schedule.epoch", 1), "did you mean schedule.epochs?"),
        (("evaluate", "nowhere"), "RUN: nowhere: no such file or folder"),
        (("evaluate", "RUN", "--batchsize", 1), "unknown option --batchsize (did you mean --batch_size?)"),
        (("evaluate", "RUN", "RUN"), "is given twice"),
        (("audit", "RUN", "RUN"), "is given twice"),
        (("evaluate", "RUN", "OTHER", "--output", "x"), "--output takes one run"),
        (("predict", "nowhere", "a.jpg"), "RUN: nowhere: no such file or folder"),
        (("predict", "RUN", "a.jpg"), "a.jpg: no such file"),
        (("predict", "--devcie", "cpu"), "unknown option --devcie (did you mean --device?)"),
        (("search", "query", "RUN", "a.jpg"), "a.jpg: no such file"),
        (("search", "query", "RUN", "--splt", "all"), "unknown option --splt (did you mean --split?)"),
        (("search", "index", "nowhere"), "RUN: nowhere: no such file or folder"),
        (("monitor", "RUN", "nowhere"), "BATCH: nowhere: no such file or folder"),
        (("monitor", "RUN", "x", "--false_alarm", 1), "unknown option --false_alarm (did you mean --false_alarms?)"),
        (("export", "nowhere", "--to", "hub"), "RUN: nowhere: no such file or folder"),
        (("export", "RUN", "--too", "hub"), "unknown option --too (did you mean --to?)"),
        (("checkpoint", "nowhere"), "RUN: nowhere: no such file or folder"),
        (("checkpoint", "RUN", "--jsn"), "unknown option --jsn (did you mean --json?)"),
        (("duplicates", "--treshold", 1), "unknown option --treshold (did you mean --threshold?)"),
        (("benchmark", "all", "--bacth", 3), "unknown option --bacth (did you mean --batch?)"),
        (("benchmark", "plot", "nowhere.json"), "nowhere.json"),
        (("doctor", "--ouput", 1), "unknown option --ouput (did you mean --output?)"),
    ],
)
def test_a_mistake_is_one_line_before_torch(args: tuple[object, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("")
    places = {"RUN": tmp_path, "OTHER": tmp_path / "other"}
    status, said, seconds = ask(*(places.get(str(arg), arg) for arg in args))
    assert status == 2 and seconds < SECONDS
    assert message in said and said.count("\n") == 0


ONE_PROCESS: dict[str, tuple[str, ...]] = {
    "predict": ("RUN", "RUN"),
    "search": ("query", "RUN", "RUN"),
    "monitor": ("RUN", "RUN"),
    "export": ("RUN", "--to", "hub"),
    "audit": ("RUN",),
    "checkpoint": ("RUN",),
    "data": ("fashion_mnist",),
    "duplicates": (),
}


def test_every_command_shares_its_work_among_processes_or_runs_in_one() -> None:
    files, joined = ("train", "evaluate", "launch"), ("doctor", "benchmark")  # launch reads and prints only
    assert {*ONE_PROCESS, *files, *joined} == set(COMMANDS)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_command_of_one_process_refuses_to_be_one_of_several(
    name: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setenv(variable, "2")
    monkeypatch.setenv("RANK", "1")
    main = importlib.import_module(COMMANDS[name][0]).main
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path) if arg == "RUN" else arg for arg in ONE_PROCESS[name]])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    message = (
        rf"^fmnist {name}[ a-z]*: error: {variable} is 2, and this command runs in one process: .* unset {variable}$"
    )
    assert re.match(message, said.err)
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1", "RANK": "3"}, {"WORLD_SIZE": "x"}, {"PMI_SIZE": ""}])
def test_one_process_is_alone_whatever_else_is_left_over(environ: dict[str, str]) -> None:
    check_alone(environ)


def test_commands_that_share_their_work_may_be_one_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path)])
    assert evaluation_options.parse_args().paths == [tmp_path]
    assert benchmark_options.parse(["data"]).mode == "data"
    assert doctor.PARSER.parse_args([]).json is False


@pytest.mark.thorough
def test_two_processes_of_a_launcher_are_refused_in_one_line(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = execute(*launcher, "-m", "fmnist", "data", "fashion_mnist", "--output", tmp_path / "out")
    ours = [line for line in done.stderr.splitlines() if line.startswith("fmnist data: ")]
    assert done.returncode == 1 and len(ours) == 1 and ours[0].startswith("fmnist data: error: WORLD_SIZE is 2, and ")
    assert not (tmp_path / "out").exists()


def test_launch_prints_the_run_directory(small_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_config.parent)
    assert command(launch_main, "--config", small_config) == f"{small_config.parent / 'runs' / 'small'}\n"
    assert command(launch_main, "--output_dir", "x") == f"{small_config.parent / 'x'}\n"
    # A shipped recipe is found wherever the command is called.
    assert command(launch_main, "--config=configs/mlp.yaml") == f"{small_config.parent / 'runs' / 'mlp'}\n"


def test_shipped_recipes_are_found_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped("train.py") == ROOT / "train.py"
    assert find_recipe("configs/mlp.yaml") == ROOT / "configs" / "mlp.yaml"
    for other in ("mlp.yaml", "/configs/mlp.yaml", "../configs/mlp.yaml", "README.md"):
        assert find_recipe(other) == Path(other)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mlp.yaml").write_text("")
    assert find_recipe("configs/mlp.yaml") == Path("configs/mlp.yaml")  # one's own comes first


def test_doctor_answers_each_question_and_finds_what_would_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(command(doctor_main, "--device", "cpu", "--output", tmp_path, "--json"))
    assert list(found) == [
        *("python", "torch", "compile", "device", "bf16", "all-reduce", "data", "weights", "wandb", "slurm", "disk"),
    ]
    assert all(Line(name, **answer).state in ("ok", "note") for name, answer in found.items())
    assert "sha256 as published" in found["data"]["text"] and str(tmp_path) in found["disk"]["text"]
    lines = command(doctor_main, "--device", "cpu", "--output", tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == list(found)

    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "train-labels-idx1-ubyte").write_bytes(b"")
    monkeypatch.setattr("fmnist.apps.doctor.MIN_FREE_BYTES", 1 << 62)
    args = ("--device", "gpu_9", "--data.root", tmp_path / "part", "--output", tmp_path, "--json")
    failed = json.loads(command(doctor_main, *args, status=1, lines=0))
    assert {name for name, answer in failed.items() if answer["state"] == "fail"} == {
        *("device", "all-reduce", "data", "disk"),
    }
    assert "lacks train-images-idx3-ubyte" in failed["data"]["text"] and "gpu_9" in failed["device"]["text"]


@pytest.mark.thorough
def test_doctor_sums_over_the_processes_it_is_launched_with(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environ = environment()
    del environ["ACCELERATE_USE_CPU"]  # as a user would launch it
    done = execute(*launcher, "-m", "fmnist", "doctor", "--device", "cpu", "--json", "--output", tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["all-reduce"] == {"state": "ok", "text": "gloo over 2 processes on 1 node: sum 2"}


@pytest.mark.thorough
def test_evaluate_goes_where_it_is_told_and_says_what_it_does(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = write_small_data(tmp_path / "data")
    run = untrained(tmp_path / "run", ModelConfig(name="mlp", options={"width": 16}), 28)
    flags = ["--quick", "--output", "out", "--device", "cpu", "--batch_size", "1000", "--data.root", str(data)]
    done = execute(sys.executable, "-m", "fmnist", "evaluate", run, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run (1 of 1): test images" in done.stderr and "written to out" in done.stdout
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_images"] == NUM_TEST
    assert not (run / "evaluation").exists()


@pytest.mark.thorough
def test_a_wheel_has_everything_and_trains(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: a wheel cannot be built offline")
    source = tmp_path / "source"
    for path in [*ROOT.glob("*.*"), *ROOT.glob("configs/*"), *ROOT.glob("fmnist/**/*"), ROOT / "LICENSE"]:
        if path.is_file() and path.suffix != ".pyc":
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), "."]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True, timeout=200, cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("fmnist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    ours = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fmnist/**/*") if path.suffix in (".py", ".html")}
    shipped_files = {f"fmnist/shipped/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("configs/*.yaml")}
    shipped_files |= {"fmnist/shipped/train.py", "fmnist/shipped/evaluate.py"}
    assert {name for name in held if not name.startswith("fmnist-")} == ours | shipped_files
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"fmnist": "fmnist.__main__:main"}

    empty = tmp_path / "empty"
    empty.mkdir()
    environ = environment() | {"PYTHONPATH": str(tmp_path / "site")}
    flags = ["--config", "configs/mlp.yaml", "--schedule.steps", "2", "--schedule.warmup_epochs", "0"]
    start = [sys.executable, "-c", "import sys; from fmnist.__main__ import main; sys.exit(main())"]
    done = execute(*start, "train", *flags, "--log.wandb", "disabled", env=environ, cwd=empty)
    assert done.returncode == 0, done.stderr
    assert json.loads((empty / "runs" / "mlp" / "summary.json").read_text())["steps"] == 2
    assert os.listdir(empty) == ["runs"]
