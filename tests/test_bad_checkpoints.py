"""Bad checkpoints of every kind: the older good one is taken and the bad file named, or the run ends with one line.

None is ever loaded in silence. The command `fmnist checkpoint` says the same without loading.
"""

import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, execute, warm_train
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

from fmnist.apps.checkpoints import inspect, main
from fmnist.checkpoint.contents import EMA, FORMAT, MANIFEST, MODEL, OPTIMIZER, STATE, TrainState, verify
from fmnist.checkpoint.run_directory import lock_directory, open_directory
from fmnist.checkpoint.start_weights import find_start_weights
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import optimizer_tensors, read_tensors
from fmnist.config.parse import load_config
from fmnist.config.same_run import recipe
from fmnist.config.schema import AugmentConfig, Config, ModelConfig, OptimConfig, to_yaml
from fmnist.data.fashion_mnist import INFO
from fmnist.data.info import DATA_FILE
from fmnist.network import build_network
from fmnist.optim import build_optimizer
from fmnist.run import Run
from fmnist.trained import open_trained
from fmnist.training.resume import restore

CFG = Config(
    model=ModelConfig(name="cnn", options={"widths": [4, 8]}, precision="fp32"),
    augment=AugmentConfig(size=28),
    optim=OptimConfig(ema_decay=0.9),
)
FILES = (MANIFEST, STATE, MODEL, EMA, OPTIMIZER)
CPU = torch.device("cpu")


def make_run(run: Path, cfg: Config = CFG, **meta: object) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3, trained on noise; step 2 is the best, its weights exported."""
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(cfg))
    (run / DATA_FILE).write_text(json.dumps(INFO.to_json()))
    torch.manual_seed(0)
    model, _ = build_network(cfg, INFO, CPU, load_weights=False)
    optimizer = build_optimizer(model, cfg.optim)
    ema = ModelEmaV3(model, decay=0.9)
    about = {"model": cfg.model.name, "world_size": 1, "versions": {"torch": torch.__version__}, "config": recipe(cfg)}
    checkpoints = Checkpoints(run / "checkpoints", 3, about | meta)
    for step in (1, 2, 3):
        model(torch.randn(8, 1, 28, 28)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        groups = {
            MODEL: model.state_dict(),
            OPTIMIZER: optimizer_tensors(model, optimizer),
            EMA: ema.module.state_dict(),
        }
        checkpoints.save(TrainState(step=step, best_step=min(step, 2), best_val={"top1": 0.5}), groups)
    checkpoints.export(2, run / MODEL)
    return run


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints/step_00000003"


def resume(run: Path, cfg: Config = CFG) -> tuple[TrainState, nn.Module]:
    """What a restart does before it trains: check the directory, find the newest good checkpoint, put it back."""
    cfg = replace(cfg, output_dir=str(run))
    open_directory(cfg)
    found = Checkpoints(run / "checkpoints", 3, {}).newest_good()
    assert found is not None
    model, _ = build_network(cfg, INFO, CPU, load_weights=False)
    optimizer = build_optimizer(model, cfg.optim)
    ema = ModelEmaV3(model, decay=0.9)
    return restore(found, cfg, model, ema, optimizer), model


def seal(checkpoint: Path) -> None:
    """Write a manifest that fits what lies there, as one who plants a checkpoint would."""
    import hashlib

    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in checkpoint.iterdir()
        if path.name != MANIFEST
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))


def test_the_undamaged_run_resumes_at_its_newest(run: Path) -> None:
    state, model = resume(run)
    assert state.step == 3
    for name, tensor in read_tensors(newest(run) / MODEL).items():
        assert torch.equal(model.state_dict()[name], tensor)


def damage(run: Path, kind: str, file: str) -> None:
    path, data = newest(run) / file, (newest(run) / file).read_bytes()
    if kind.startswith("truncated"):
        length = {"0": 0, "1": 1, "half": len(data) // 2, "n-1": len(data) - 1}[kind.split()[1]]
        path.write_bytes(data[:length])
    elif kind == "missing":
        path.unlink()
    elif kind == "dangling link":
        path.unlink()
        path.symlink_to(run / "nowhere")
    elif kind == "a directory":
        path.unlink()
        path.mkdir()
    elif kind == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        shutil.copy(run / "checkpoints/step_00000002" / file, path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "kind",
    [
        *("truncated 0", "truncated 1", "truncated half", "truncated n-1"),
        *("missing", "dangling link", "a directory", "a pipe", "another step's"),
    ],
)
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(
    kind: str, file: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(run, kind, file)
    state, model = resume(run)
    assert state.step == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "step_00000003" in warnings[0] and "\n" not in warnings[0]
    if file != MANIFEST or "another" not in kind:  # then it is the other files that differ from it
        assert file in warnings[0] or MANIFEST in warnings[0]
    for name, tensor in read_tensors(run / "checkpoints/step_00000002" / MODEL).items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_every_one_of_64_flipped_bits_a_file_is_found(run: Path) -> None:
    generator = random.Random(0)
    for file in FILES:
        path = newest(run) / file
        data = path.read_bytes()
        for bit in generator.sample(range(8 * len(data)), 64):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match="step_00000003"):
                verify(newest(run))
        path.write_bytes(data)
    verify(newest(run))


def test_a_dangling_link_or_a_file_under_a_checkpoints_name_is_passed_over(run: Path) -> None:
    (run / "checkpoints/step_00000004").symlink_to(run / "nowhere")
    (run / "checkpoints/step_00000005").write_text("not a directory")
    assert resume(run)[0].step == 3


def test_another_format_is_passed_over(run: Path) -> None:
    manifest = json.loads((newest(run) / MANIFEST).read_text())
    (newest(run) / MANIFEST).write_text(json.dumps(manifest | {"format": FORMAT + 1}))
    assert resume(run)[0].step == 2


@pytest.mark.parametrize("field", ["optim.lr", "model.name", "seed", "batch.global_batch_size"])
def test_a_checkpoint_of_another_config_is_refused_by_name(field: str, run: Path, tmp_path: Path) -> None:
    state = json.loads((newest(run) / STATE).read_text())
    state["meta"]["config"][field] = "other"
    (newest(run) / STATE).write_text(json.dumps(state))
    seal(newest(run))
    with pytest.raises(ValueError, match=rf"step_00000003.*{field} was other, now"):
        resume(run)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (replace(CFG, model=replace(CFG.model, options={"widths": [4, 16]})), "model.options was"),
        (replace(CFG, model=ModelConfig(name="mlp", precision="fp32")), "model.name was mlp, now cnn"),
        (replace(CFG, optim=replace(CFG.optim, name="sgd")), "optim.name was sgd, now adamw"),
    ],
    ids=["architecture", "model", "optimizer"],
)
@pytest.mark.parametrize("says", ["the truth", "nothing"])
def test_a_planted_checkpoint_of_another_model_is_refused(
    other: Config, expected: str, says: str, run: Path, tmp_path: Path
) -> None:
    planted = make_run(tmp_path / "other", other, **({} if says == "the truth" else {"config": {}}))
    shutil.rmtree(newest(run))
    shutil.copytree(newest(planted), newest(run))
    with pytest.raises(ValueError) as caught:
        resume(run)
    assert "step_00000003" in str(caught.value)
    assert (expected if says == "the truth" else "does not fit") in str(caught.value)


def test_another_number_of_classes_is_refused(run: Path) -> None:
    for file in (MODEL, EMA):
        tensors = read_tensors(newest(run) / file)
        save_file(tensors | {"head.weight": torch.zeros(7, 8), "head.bias": torch.zeros(7)}, newest(run) / file)
    seal(newest(run))
    with pytest.raises(ValueError, match=r"step_00000003/model.safetensors does not fit.*head.weight is \[7, 8\]"):
        resume(run)


def test_a_missing_optimizer_tensor_is_refused(run: Path) -> None:
    tensors = read_tensors(newest(run) / OPTIMIZER)
    tensors.pop("exp_avg/head.weight")
    save_file(tensors, newest(run) / OPTIMIZER)
    seal(newest(run))
    with pytest.raises(ValueError, match="step_00000003/optimizer.safetensors does not fit"):
        resume(run)


def test_another_process_count_and_torch_version_are_no_fault_but_the_version_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", world_size=8, versions={"torch": "1.0"})
    assert resume(run)[0].step == 3
    assert "written with torch 1.0" in caplog.text


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"step": "3"}', '{"step": 3, "best_val": {"top1": NaN}}', '{"step": 9}', "[" * 5000]
)
def test_a_state_that_is_none_is_refused(text: str, run: Path) -> None:
    (newest(run) / STATE).write_text(text)
    seal(newest(run))
    with pytest.raises(ValueError, match="step_00000003"):
        resume(run)


class Trap:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("file", [*FILES, "optimizer.pt", "custom_checkpoint_0.pkl", "random_states_0.pkl"])
def test_a_malicious_pickle_is_never_executed(file: str, sealed: bool, run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (newest(run) / file).write_bytes(pickle.dumps(Trap(marker)))
    if sealed and file != MANIFEST:
        seal(newest(run))
    if sealed and file in (STATE, MODEL, EMA, OPTIMIZER):
        with pytest.raises(ValueError, match=f"step_00000003/{file}"):
            resume(run)
    else:
        assert resume(run)[0].step == (3 if file not in FILES else 2)
    assert not marker.exists()
    inspect(run)
    assert not marker.exists()


def test_a_checkpoint_that_is_dropped_while_it_is_looked_at_is_not_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run, which goes on meanwhile."""
    whole, seen = inspect(run)[0], list[Path]()

    def dropped(path: Path) -> dict[str, str]:
        if not seen:
            shutil.rmtree(path)
        seen.append(path)
        return verify(path)

    monkeypatch.setattr("fmnist.checkpoint.contents.verify", dropped)
    found, problems = inspect(run)
    assert [checked.step for checked in found] == [checked.step for checked in whole[1:]] and problems == []


@pytest.mark.parametrize("file", ["config.yaml", MODEL, "summary.json"])
def test_a_malicious_pickle_in_the_run_directory_is_never_executed(file: str, run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (run / "summary.json").write_text('{"status": "finished"}')
    (run / file).write_bytes(pickle.dumps(Trap(marker)))
    if file == "summary.json":
        assert open_trained(run).summary == {}
    else:
        with pytest.raises(ValueError, match=file):
            print(open_trained(run, CPU).model)
    (run / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ValueError, match="config.yaml"):
        load_config(run / "config.yaml")
    assert not marker.exists()


def test_the_best_one_damaged_or_lost_is_said_and_the_newest_exported(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(run / "checkpoints", 3, {})
    damaged = run / "checkpoints/step_00000002" / EMA
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    checkpoints.export(2, run / MODEL)
    assert (run / MODEL).read_bytes() == (newest(run) / EMA).read_bytes()
    assert "step_00000002/ema.safetensors is not what was written" in caplog.text
    shutil.rmtree(damaged.parent)
    checkpoints.export(2, run / MODEL)
    assert (run / MODEL).read_bytes() == (newest(run) / EMA).read_bytes()


def test_a_save_after_damaged_later_ones_drops_them_and_keeps_itself(run: Path) -> None:
    for step in (2, 3):
        (run / f"checkpoints/step_{step:08d}" / MODEL).write_bytes(b"damaged")
    checkpoints = Checkpoints(run / "checkpoints", 1, {})
    checkpoints.save(TrainState(step=2, best_step=2), {MODEL: {"weight": torch.ones(2)}, OPTIMIZER: {}})
    assert checkpoints.steps() == [2]  # not [3], though it is the newest by name
    verify(checkpoints.path(2))


# --- two writers, and places that cannot be written -------------------------------------------------------------------


def test_a_read_only_directory_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("fmnist.checkpoint.run_directory.os.open", refuse)
    with pytest.raises(ValueError, match=r"output_dir .*run cannot be written: Read-only file system"):
        lock_directory(run)


def test_a_lock_is_held_by_one_process_and_ends_with_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmnist.checkpoint.run_directory.LOCK_WAIT_S", 0.2)
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        held = lock_directory(run)  # for as long as this lives
        os.write(writer, b"1")
        signal.pause()
        held.release()
    try:
        assert os.read(reader, 1) == b"1"
        with pytest.raises(ValueError, match=rf"in use by another process \(host .*, process {holder}\)"):
            lock_directory(run)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    lock_directory(run).release()  # the kernel let go of it


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_directory_goes_ends_and_writes_no_other(
    replaced: bool, small_config: Path, tmp_path: Path
) -> None:
    """It once made the directory anew without config.yaml or metrics, or wrote into another run's, and ended with 0."""
    run, away, others = tmp_path / "run", tmp_path / "away", {".lock": "host elsewhere, process 7\n", "config.yaml": ""}

    def move() -> None:
        deadline = time.monotonic() + 200
        while not (run / "checkpoints/step_00000004").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        run.rename(away)
        if replaced:
            begun.rename(run)

    begun = tmp_path / "begun"  # a run that somebody began meanwhile
    begun.mkdir()
    for name, text in others.items():
        (begun / name).write_text(text)
    mover = threading.Thread(target=move)
    mover.start()
    flags = ["--schedule.steps", "2000", "--checkpoint.every_steps", "2", "--evaluation.every_steps", "50000"]
    done = warm_train("--config", small_config, "--output_dir", run, *flags, check=False)
    mover.join()
    assert done.returncode == 1
    said = last_of(done.stderr)
    assert said.startswith(f"train.py: error: {run} was {'' if replaced else 'moved or deleted'}"), said
    assert said.endswith(" while this run wrote to it: nothing more is saved there")
    assert {path.name: path.read_text() for path in run.glob("*")} == (others if replaced else {})
    assert Checkpoints(away / "checkpoints", 2, {}).newest_good() is not None


def test_a_run_goes_on_without_its_lock_and_in_a_directory_that_is_moved_and_linked(run: Path) -> None:
    with Run(CFG, run) as training:
        training.claim()
        training.wait_for_save()
        run.rename(run.with_name("moved"))
        run.symlink_to(run.with_name("moved"))
        training.wait_for_save()
        (run / ".lock").unlink()
        training.wait_for_save()
        run.unlink()
        with pytest.raises(OSError, match="run was moved or deleted while this run wrote to it"):
            training.wait_for_save()


def last_of(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.thorough
def test_a_second_train_py_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path, small_config: Path) -> None:
    run = tmp_path / "run"
    flags = ["--config", str(small_config), "--output_dir", str(run), "--schedule.steps", "100000"]
    flags += ["--checkpoint.every_steps", "50"]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    first = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not list(run.glob("checkpoints/step_*")):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        second = warm_train(*flags, check=False)
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1, second.stderr
        assert f"run is in use by another process (host {os.uname().nodename}, process {first.pid})" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert Checkpoints(run / "checkpoints", 2, {}).newest_good() is not None
    assert "resuming from" in warm_train(*flags, "--max_minutes", "0.001").stderr


@pytest.mark.slow
def test_of_two_that_start_a_run_at_once_one_trains_and_the_other_is_refused(
    tmp_path: Path, small_config: Path
) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(small_config), "--schedule.steps", "1000"]
    command += ["--output_dir", str(tmp_path / "run"), "--checkpoint.every_steps", "100"]
    both = [
        subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    errors = [child.communicate(timeout=500)[1] for child in both]
    assert sorted(child.returncode for child in both) == [0, 2], errors
    refused = errors[0] if both[0].returncode else errors[1]
    assert "another process" in refused
    assert main([str(tmp_path / "run")]) == 0


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_good_and_what_would_be_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in found["checkpoints"]] == [1, 2, 3]
    assert [entry["roles"] for entry in found["checkpoints"]] == [[], ["weights", "best"], ["resume"]]
    assert found["problems"] == []
    assert found["checkpoints"][2]["meta"]["versions"] == {"torch": torch.__version__}
    assert found["checkpoints"][2]["bytes"] == sum(path.stat().st_size for path in newest(run).iterdir())
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.safetensors is a copy of it" in lines[2]
    assert "a restart continues from it" in lines[3] and f"torch {torch.__version__}" in lines[3]


def test_weights_alone_are_shown_and_used_and_never_resumed_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = json.loads((newest(run) / STATE).read_text())["meta"]
    weights = {name: tensor + 1 for name, tensor in read_tensors(newest(run) / EMA).items()}
    best = Checkpoints(run / "checkpoints", 3, meta).save(TrainState(step=5, best_step=5), {EMA: weights})
    assert main([str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(entry["step"], entry["full"]) for entry in found] == [(1, True), (2, True), (3, True), (5, False)]
    assert [entry["roles"] for entry in found] == [[], ["weights"], ["resume"], ["best"]]
    assert main([str(run)]) == 0
    assert "weights alone; best on validation" in capsys.readouterr().out.splitlines()[4]
    assert resume(run)[0].step == 3
    trained = open_trained(best)
    assert torch.equal(trained.model.state_dict()["head.bias"], weights["head.bias"])
    assert find_start_weights(str(best)).file == best / EMA
    alone = run.parent / "killed before its first full checkpoint"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("step_*", MODEL, "summary.json"))
    trained = open_trained(alone)
    assert trained.weights == alone / "checkpoints" / best.name / EMA
    assert torch.equal(trained.model.state_dict()["head.bias"], weights["head.bias"])
    assert find_start_weights(str(alone)).file == trained.weights
    (best / EMA).write_bytes(b"")
    assert main([str(run)]) == 1
    assert "best_00000005/ema.safetensors is not what was written" in capsys.readouterr().out
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    assert main([str(run)]) == 1
    assert "holds no checkpoint to resume from" in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES)
def test_the_command_names_a_damaged_file_with_status_1(
    file: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (newest(run) / file).write_bytes(b"")
    assert main([str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert file in found["checkpoints"][2]["problem"]
    assert [entry["roles"] for entry in found["checkpoints"]] == [[], ["resume", "weights", "best"], []]
    assert main([str(run)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_the_command_finds_values_that_are_not_finite_and_another_config(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = read_tensors(newest(run) / OPTIMIZER)
    tensors["exp_avg/head.bias"][3] = float("nan")
    save_file(tensors, newest(run) / OPTIMIZER)
    seal(newest(run))
    (run / "config.yaml").write_text(to_yaml(replace(CFG, seed=7)))
    assert main([str(run)]) == 1
    text = capsys.readouterr().out
    assert "optimizer.safetensors: exp_avg/head.bias" in text
    assert "step_00000002 is of another config: seed was 0, now 7" in text


def test_the_command_finds_exported_weights_that_are_damaged(run: Path) -> None:
    (run / "summary.json").write_text('{"status": "finished"}')
    assert main([str(run)]) == 0
    data = bytearray((run / MODEL).read_bytes())
    data[-1] ^= 1
    (run / MODEL).write_bytes(data)
    assert main([str(run)]) == 1


def test_the_command_answers_a_bad_path_with_one_line_and_status_2(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, expected in ((tmp_path, "holds no config.yaml"), (tmp_path / "nowhere", "no such file or folder")):
        with pytest.raises(SystemExit) as caught:
            main([str(path)])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and str(path) in err and expected in err
    done = execute(sys.executable, "-m", "fmnist", "checkpoint", run, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step        3" in done.stdout
