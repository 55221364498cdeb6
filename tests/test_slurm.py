"""The scripts of slurm/ on a real SLURM of two nodes: to the end, preempted, out of time, as an array, cancelled."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, SMALL_RUN, environment, metrics, train
from PIL import Image
from slurm_cluster import Cluster, missing_programs
from test_signals import mentioning

from fmnist.checkpoint.fingerprint import kept_fingerprint
from fmnist.config.parse import load_config
from fmnist.config.schema import DataConfig
from fmnist.data.registry import open_source
from fmnist.runtime.files import read_json
from fmnist.runtime.launcher import signal_warning

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        bool(missing_programs()) and not os.environ.get("CI"), reason=f"SLURM is not installed: {missing_programs()}"
    ),
]
STEPS = 400  # long enough to be caught in the middle
SCRIPT = "slurm/train.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert not missing_programs(), f"CI needs SLURM; missing: {missing_programs()}"
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = yaml.safe_load(SMALL_RUN)
    options["schedule"] = {"steps": STEPS, "warmup_steps": 2}
    options["evaluation"] = {"every_steps": STEPS}
    options["checkpoint"] = {"every_steps": 100}
    options["log"]["every_steps"] = 5
    options["exact"] = 1  # one thread, however it is launched: the same bits in a job and outside
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.fixture(scope="module")
def unbroken(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train("--config", config, "--output_dir", run)
    return run


def summary(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.exists() else []  # the last may be half written
    return json.loads(lines[-1])["step"] if lines else 0


def same_run(one: Path, other: Path) -> bool:
    assert metrics(one) == metrics(other)
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def processes_of(run: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-af", str(run)], capture_output=True, text=True).stdout.splitlines()
    return [line for line in found if "pgrep" not in line]


def test_two_nodes_train_together_to_the_end(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = cluster.submit("--nodes=2", SCRIPT, config, "--output_dir", run, "--schedule.steps", 12, "--exact", 2)
    record = cluster.wait_for(job)
    assert (record["JobState"], record["NumNodes"]) == ("COMPLETED", "2"), cluster.log(job)
    assert (summary(run)["status"], summary(run)["world_size"], summary(run)["steps"]) == ("finished", 2, 12)
    assert "nodes: 2, processes on each: 1" in cluster.log(job)
    assert "set in the job's environment" not in cluster.log(job)


@pytest.mark.parametrize("how", ["preempted", "out of time"])
def test_a_broken_job_goes_on_by_itself_and_ends_as_if_unbroken(
    cluster: Cluster, config: Path, unbroken: Path, tmp_path: Path, how: str
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(SCRIPT, config, "--output_dir", run)
    cluster.wait_until(lambda: steps(run) >= 20, f"step 20 {cluster.log(job)}", 120)
    if how == "preempted":
        cluster.call("scontrol", "requeue", job)
    else:  # what --signal=B:USR1@120 sends two minutes before the limit
        cluster.call("scancel", "--batch", "--signal=USR1", job)
    record = cluster.wait_for(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert "resuming from" in cluster.log(job)
    assert summary(run)["status"] == "finished"
    assert not (run / "REQUEUE").exists()
    assert same_run(run, unbroken)


def test_a_signal_during_the_last_evaluation_lets_the_run_finish(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(
        SCRIPT, config, "--output_dir", run, "--schedule.steps", 12, "--evaluation.batch_size", 4,
    )  # fmt: skip

    def trained() -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and any(json.loads(line)["prefix"] == "val" for line in path.read_text().splitlines())

    cluster.wait_until(trained, f"the validation after the last step {cluster.log(job)}", 120)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    record = cluster.wait_for(job)
    assert "death signal" in cluster.log(job)  # the launcher heard it, and ended with 1
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "0"), cluster.log(job)
    assert summary(run)["status"] == "finished"


def test_restarts_are_capped(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = cluster.submit(SCRIPT, config, "--output_dir", run, "--max_minutes", 0.001, FMNIST_MAX_RESTARTS="1")
    record = cluster.wait_for(job)
    assert (record["JobState"], record["Restarts"]) == ("FAILED", "1"), cluster.log(job)
    assert "has been restarted 1 times: not again" in cluster.log(job)
    assert summary(run)["status"] == "stopped"


def test_an_array_of_three_seeds_gives_three_runs(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    names = [f"small_seed{seed}" for seed in range(3)]
    grid = tmp_path / "grid.txt"
    grid.write_text("".join(f"--seed {seed} --output_dir {tmp_path / name}\n" for seed, name in enumerate(names)))
    job = cluster.submit(
        "--array=1-3",
        "slurm/array.sbatch",
        config,
        "--schedule.steps",
        12,
        "--log.every_steps",
        1,
        FMNIST_GRID=str(grid),
    )
    cluster.wait_until(lambda: job_is_over(cluster, job), f"array {cluster.log(job)}", 240)
    runs = [tmp_path / name for name in names]
    assert [(summary(run)["status"], summary(run)["seed"]) for run in runs] == [("finished", s) for s in range(3)]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 3


def job_is_over(cluster: Cluster, job: int) -> bool:
    states = [line for line in cluster.call("squeue", "-h", "-j", job, "-o", "%T").splitlines() if line]
    busy = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
    return not [state for state in states if state in busy or "error" in state]  # a controller that does not answer


def test_an_array_task_without_a_grid_is_a_seed(cluster: Cluster, config: Path) -> None:
    job = cluster.submit("--array=5", "slurm/array.sbatch", config, "--optim.lr", "fast")
    cluster.wait_until(lambda: job_is_over(cluster, job), f"array {cluster.log(job)}", 60)
    assert "optim.lr" in cluster.log(job)  # the flags arrive, and the seed's run directory is not made
    assert not (ROOT / "runs" / "small_seed5").exists()


def test_a_bad_config_fails_once_and_fast_with_its_line(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    job = cluster.submit(SCRIPT, config, "--optim.lrr", 1, "--output_dir", tmp_path / "run")
    record = cluster.wait_for(job)
    assert (record["JobState"], record["Restarts"], record["ExitCode"]) == ("FAILED", "0", "2:0")
    assert time.monotonic() - start < 30
    assert "fmnist launch: error: option '--optim.lrr' does not exist" in cluster.log(job)
    assert "optim.lrr" in cluster.log(job)
    assert not (tmp_path / "run").exists()


def test_a_fault_is_not_requeued(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")  # a damaged file, found when the data is read
    job = cluster.submit(SCRIPT, config, "--data.root", tmp_path, "--output_dir", tmp_path / "run")
    record = cluster.wait_for(job)
    assert (record["JobState"], record["Restarts"]) == ("FAILED", "0"), cluster.log(job)
    assert "train.py: error: " in cluster.log(job)


def test_a_wrong_number_of_processes_is_one_line(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMNIST_EXPECTED_WORLD_SIZE", "2")
    done = train("--config", config, "--output_dir", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert "started: 1 process, and FMNIST_EXPECTED_WORLD_SIZE is 2" in done.stderr
    assert not (tmp_path / "run").exists()


FEW = ("--schedule.steps", 12, "--checkpoint.every_steps", 4)


@pytest.mark.parametrize("export", ["NONE", "FMNIST_VENV={},FMNIST_PROCESSES_PER_NODE=1"])
def test_a_job_without_the_callers_environment_trains(
    cluster: Cluster, config: Path, tmp_path: Path, export: str
) -> None:
    run, script = tmp_path / "run", tmp_path / "with_venv.sh"
    script.write_text(f'#!/bin/bash\nexport FMNIST_VENV={sys.prefix}\nexec bash {SCRIPT} "$@"\n')
    job = cluster.submit(f"--export={export.format(sys.prefix)}", script, config, "--output_dir", run, *FEW)
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert summary(run)["status"] == "finished"


def test_a_job_runs_in_the_folder_that_chdir_names(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run, script = tmp_path / "run", ROOT / SCRIPT
    job = cluster.submit(f"--chdir={ROOT}", script, config, "--output_dir", run, *FEW, folder=tmp_path)
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", cluster.log(job)
    lost = cluster.submit(script, config, folder=tmp_path)
    assert cluster.wait_for(lost)["ExitCode"] == "2:0"
    assert said(cluster, lost) == [
        f"slurm/train.sbatch: error: {tmp_path} is not the root of the repository: "
        "submit from there, or add --chdir=ROOT"
    ]
    array = cluster.submit("--array=3", ROOT / "slurm/array.sbatch", config, folder=tmp_path)
    cluster.wait_until(lambda: job_is_over(cluster, array), "the array", 60)
    assert f"{tmp_path} is not the root of the repository" in cluster.log(array)


ODD = "a root with  spaces, 'quotes', \"more\", $HOME `id` * ? \\ ; & \u00fc"


@pytest.mark.parametrize(("name", "nodes"), [("folder", 2), ("npz", 1)])
def test_options_reach_the_run_as_they_were_typed(
    cluster: Cluster, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nodes: int
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 12, 12), dtype=np.uint8)
    home, run, root = tmp_path / ODD, tmp_path / ODD / "run", tmp_path / ODD / "set.npz"
    home.mkdir()
    if name == "npz":
        np.savez(root, train_images=images, train_labels=np.arange(80) % 2, class_names=np.array(["it's one", "two"]))
    else:
        for number, image in enumerate(images):
            (root := home / "set").joinpath(("it's one", "two")[number % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / ("it's one", "two")[number % 2] / f"{number:02} 'a'.png")
    decisions = home / "my decisions.csv"
    monkeypatch.setenv("FMNIST_CACHE", str(tmp_path / "elsewhere"))
    source = open_source(DataConfig(name=name, root=str(root), val_size=8))
    _, labels, positions = source.read("train")
    given, other = (source.info.class_names[at] for at in (labels[0], 1 - labels[0]))
    decisions.write_text(f"split,index,label,suggested,decision\ntrain,{positions[0]},{given},{other},relabel\n")
    own = Path(shutil.copy(config, home / "my config.yaml"))
    options = {"--data.name": name, "--data.root": root, "--data.corrections": decisions, "--output_dir": run}
    options |= {"--schedule.steps": 12, "--data.val_size": 8, "--exact": 2, "--batch.global_batch_size": 8}
    job = cluster.submit(
        f"--nodes={nodes}",
        SCRIPT,
        own,
        *(word for option in options.items() for word in option),
        FMNIST_PROCESSES_PER_NODE=str(2 // nodes),
        FMNIST_CACHE=str(tmp_path / "cache"),
    )
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", cluster.log(job)
    kept = load_config(run / "config.yaml")
    assert (kept.data.root, kept.data.corrections) == (str(root), str(decisions))
    assert (summary(run)["status"], summary(run)["world_size"], summary(run)["steps"]) == ("finished", 2, 12)
    assert read_json(run / "data.json")["class_names"] == ["it's one", "two"]
    assert kept_fingerprint(run)["data.corrections"] != "none"
    # once for all processes of a node; the two nodes here are one machine with one cache, and where the second comes
    # first, whose log lines are not shown, nobody says it
    said = cluster.log(job).count("decoding 80 pictures of")
    assert said == (name == "folder") or (nodes, said) == (2, 0)


def said(cluster: Cluster, job: int) -> list[str]:
    return [line for line in cluster.log(job).splitlines() if line and not line.startswith(("srun:", "slurmstepd"))]


@pytest.mark.parametrize(
    ("options", "env", "line"),
    [
        ([], {"FMNIST_VENV": "/nonexistent"}, "FMNIST_VENV is /nonexistent, which has no bin/python"),
        ([], {"FMNIST_PROCESSES_PER_NODE": "two"}, "FMNIST_PROCESSES_PER_NODE is two; valid: a number"),
        (["--nodes=2", "--gpus=3"], {"FMNIST_PROCESSES_PER_NODE": "", "ACCELERATE_USE_CPU": "true"}, "have 1 2 GPUs"),
        (["--gpus-per-task=1"], {"ACCELERATE_USE_CPU": ""}, "torch sees no GPU, and this job has 1 on its node"),
    ],
)
def test_a_job_that_cannot_train_is_one_line(
    cluster: Cluster, config: Path, tmp_path: Path, options: list[str], env: dict[str, str], line: str
) -> None:
    job = cluster.submit(*options, SCRIPT, config, "--output_dir", tmp_path / "run", **env)
    record = cluster.wait_for(job)
    assert (record["JobState"], record["Restarts"], record["ExitCode"]) == ("FAILED", "0", "2:0"), cluster.log(job)
    (only,) = said(cluster, job)
    assert line in only
    assert not (tmp_path / "run").exists()


def test_an_environment_without_an_activation_script_is_taken(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """As conda makes them."""
    conda = tmp_path / "conda env"
    (conda / "bin").mkdir(parents=True)
    for name in ("python", "torchrun"):
        (conda / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.prefix}/bin/{name} "$@"\n')
        (conda / "bin" / name).chmod(0o755)
    run = tmp_path / "runs of mine" / "run"
    job = cluster.submit(SCRIPT, config, "--output_dir", run, *FEW, FMNIST_VENV=str(conda))
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert summary(run)["status"] == "finished"


def test_every_gpu_of_a_node_gets_a_process(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """SLURM's GPUs have no device behind them: the two processes that they stand for train on the CPU."""
    options = ("--ntasks-per-node=2", "--gpus-per-task=1")
    env = {"FMNIST_PROCESSES_PER_NODE": "", "ACCELERATE_USE_CPU": "true"}
    job = cluster.submit(*options, SCRIPT, config, "--output_dir", tmp_path / "run", *FEW, "--exact", 2, **env)
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert summary(tmp_path / "run")["world_size"] == 2


@pytest.mark.parametrize("how", ["killed", "NaN"])
def test_a_lost_process_is_requeued_and_a_nan_is_not(
    cluster: Cluster, config: Path, unbroken: Path, tmp_path: Path, how: str
) -> None:
    run = tmp_path / "run"
    # each step multiplies the weights by 1 - 100 x 1: infinite after some twenty of them, most of which are saved
    diverges = ("--optim.lr", 100, "--optim.weight_decay", 1, "--checkpoint.every_steps", 1)
    flags = diverges if how == "NaN" else ()
    job = cluster.submit(SCRIPT, config, "--output_dir", run, *flags)
    if how == "killed":
        cluster.wait_until(lambda: steps(run) >= 120, f"step 120 {cluster.log(job)}", 120)
        for process in mentioning(str(run)):
            if process.environ().get("LOCAL_RANK") == "0":
                process.kill()
    record = cluster.wait_for(job)
    if how == "killed":
        assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
        assert "lost a process or node" in cluster.log(job)
        assert same_run(run, unbroken)
    else:
        assert (record["JobState"], record["Restarts"]) == ("FAILED", "0"), cluster.log(job)
        assert list(run.glob("non_finite_step_*"))


def test_a_job_that_may_not_be_requeued_stops_well(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    flags = ("--output_dir", tmp_path / "run", "--max_minutes", 0.001)
    job = cluster.submit("--no-requeue", SCRIPT, config, *flags)
    record = cluster.wait_for(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "0"), cluster.log(job)
    assert f"stopped and is not requeued: submit the same command to resume {tmp_path / 'run'}" in cluster.log(job)
    words = ["salloc", "--quiet", "bash", SCRIPT, config, *flags]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=cluster.env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "stopped and is not requeued" in done.stdout
    assert summary(tmp_path / "run")["status"] == "stopped"


def test_a_job_that_gets_nowhere_twice_fails(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """As with --time=2, where the warning comes before the first step."""
    run = tmp_path / "run"
    job = cluster.submit(SCRIPT, config, "--output_dir", run)
    for start in ("1", "2"):
        cluster.wait_until(lambda start=start: f"start {start}: nodes" in cluster.log(job), f"start {start}", 120)
        cluster.call("scancel", "--batch", "--signal=USR1", job)
    record = cluster.wait_for(job)
    assert (record["JobState"], record["Restarts"], record["ExitCode"]) == ("FAILED", "1", "1:0"), cluster.log(job)
    assert "ended twice without a new checkpoint: not again; give it more --time" in cluster.log(job)


def test_two_nodes_meet_where_the_port_of_the_job_is_taken(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    last = cluster.submit("--wrap", "true")
    with contextlib.ExitStack() as stack:
        for number in range(15000 + last, 15000 + last + 3):  # the ports of the next jobs
            taken = stack.enter_context(socket.socket())
            taken.bind(("", number))
            taken.listen()
        job = cluster.submit("--nodes=2", SCRIPT, config, "--output_dir", tmp_path / "run", *FEW, "--exact", 2)
        assert job == last + 1
        assert cluster.wait_for(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert summary(tmp_path / "run")["world_size"] == 2


READY = {
    "SLURM_JOB_ID": "17",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "60",
}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, []),  # no SLURM
        ({"SLURM_JOB_ID": "17"}, []),  # no launcher
        (READY, []),
        ({"SLURM_JOB_ID": "17", "TORCHELASTIC_RUN_ID": "none"}, ["PET_SIGNALS_TO_HANDLE", "PET_SHUTDOWN_TIMEOUT=60"]),
        (READY | {"PET_SHUTDOWN_TIMEOUT": "10"}, ["PET_SHUTDOWN_TIMEOUT=60", "10 s"]),
        ({"SLURM_JOB_ID": "17", "ACCELERATE_MIXED_PRECISION": "no"}, ["accelerate launch", "single process"]),
    ],
)
def test_missing_signal_settings_are_named(environ: dict[str, str], words: list[str]) -> None:
    warning = signal_warning(environ)
    assert (warning is not None) == bool(words)
    assert all(word in (warning or "") for word in words)


def test_scancel_leaves_no_orphan(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = cluster.submit("--nodes=2", SCRIPT, config, "--output_dir", run, "--exact", 2)
    cluster.wait_until(lambda: steps(run) >= 10, f"step 10 {cluster.log(job)}", 120)
    assert len(processes_of(run)) >= 4  # two launchers, two workers
    cluster.call("scancel", job)
    record = cluster.wait_for(job)
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0")
    cluster.wait_until(lambda: not processes_of(run), "the end of all processes", 40)


@pytest.mark.slow
def test_a_real_time_limit_is_survived(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """One minute, the least that SLURM grants: the signal comes 30 s before it ends."""
    run = tmp_path / "run"
    job = cluster.submit(
        "--time=1", "--signal=B:USR1@30", SCRIPT, config, "--output_dir", run, "--schedule.steps", 6000,
        "--log.every_steps", 100,
    )  # fmt: skip
    record = cluster.wait_for(job, 580)
    assert record["JobState"] == "COMPLETED", cluster.log(job)
    assert int(record["Restarts"]) >= 1
    assert (summary(run)["status"], summary(run)["steps"]) == ("finished", 6000)


def sweep_command(sweep: dict, program: str, chosen: list[str]) -> list[str]:
    """What W&B's agent makes of the command: each macro that stands alone is replaced."""
    values = {"${env}": ["/usr/bin/env"], "${program}": [program], "${args}": chosen}
    return [part for word in sweep["command"] for part in values.get(word, [word])]


def test_two_agents_of_a_sweep_at_once_train_in_directories_of_their_own(tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "slurm" / "sweep.yaml").read_text())
    chosen = [f"--{name}={(p.get('values') or [p['min']])[0]}" for name, p in sweep["parameters"].items()]
    small = ["--schedule.steps=2", "--schedule.warmup_epochs=0", "--augment.size=28", "--log.wandb=disabled"]
    command = sweep_command(sweep, str(ROOT / "train.py"), [*chosen, *small, "--model.options={widths: [4, 8]}"])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    agents = []
    for trial in ("a1", "b2"):
        environ = environment() | {"WANDB_RUN_ID": trial, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        agents.append(subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True))
    for agent in agents:
        _, err = agent.communicate(timeout=300)
        assert agent.returncode == 0, err[-2000:]
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["sweep_a1", "sweep_b2"]
    for run in runs:
        found = summary(tmp_path / "runs" / run)
        assert (found["status"], found["steps"]) == ("finished", 2)
    cfg = load_config(tmp_path / "runs" / "sweep_a1" / "config.yaml")
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.overwrite) == (0.005, 0.0, False)
