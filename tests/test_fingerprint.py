"""A run trusts nothing outside its verified checkpoints: other data or weights, another rank's disk, an older file."""

import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT, environment
from forks import free_socket
from safetensors.torch import save_file
from small import command, kill, newest

import fmnist
from fmnist.apps.checkpoints import main as checkpoint_main
from fmnist.apps.export.expected import open_expected
from fmnist.checkpoint.contents import EMA, FORMAT, MANIFEST, MODEL, OPTIMIZER, STATE, verify
from fmnist.checkpoint.fingerprint import CLASSES, CORRECTIONS, IMAGES, STATISTICS, WEIGHTS, kept_fingerprint
from fmnist.checkpoint.store import Checkpoints
from fmnist.config.same_run import of_all_ranks
from fmnist.config.schema import Config, DataConfig
from fmnist.data.idx import read_idx
from fmnist.data.split import Split
from fmnist.runtime.files import sha256_of
from fmnist.runtime.processes import Processes
from fmnist.trained import open_trained

CNN = {"name": "cnn", "options": {"widths": [4, 8]}, "precision": "fp32"}
ATTO = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2, "conv_mlp": False}
STEPS = 4


def go(run: Path, data: Path, **options: Any) -> fmnist.RunResults:
    """Train a few steps, with a checkpoint after each, or go on."""
    model = CNN | options.pop("model", {})
    return fmnist.train(
        ROOT / "configs" / "mlp.yaml",
        output_dir=str(run),
        model=model,
        data={"root": str(data), "val_size": 500},
        batch={"global_batch_size": 32},
        schedule={"steps": STEPS, "warmup_epochs": 0.0},
        evaluation={"every_steps": 2, "test": False},
        optim={"ema_decay": 0.0},
        checkpoint={"every_steps": 1, "keep_last": STEPS},
        log={"every_steps": 1, "wandb": "disabled"},
        **options,
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return go(tmp_path_factory.mktemp("template") / "run", data).directory


@pytest.fixture
def finished(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


@pytest.fixture
def killed(finished: Path) -> Path:
    kill(finished)
    return finished


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "fmnist")
    return caplog


def other_labels(data: Path, folder: Path, prefix: str = "train") -> Path:
    """Copy a data folder and give one image another class."""
    shutil.copytree(data, folder)
    path = folder / f"{prefix}-labels-idx1-ubyte"
    labels, _ = read_idx(path)
    labels[0] = (labels[0] + 1) % 10
    path.write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.numpy().tobytes())
    return folder


# --- what a run was made of ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["finished", "killed"])
@pytest.mark.parametrize(("prefix", "kind"), [("train", "training"), ("t10k", "test")])
def test_other_labels_are_refused_whether_the_run_is_finished_or_not(
    state: str, prefix: str, kind: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(state)
    with pytest.raises(ValueError, match=rf"run holds a run .*{kind} images in data.root was sha256 \w+, now sha256"):
        go(run, other_labels(data, tmp_path / "other", prefix))


def test_a_moved_folder_with_the_same_bytes_goes_on_to_the_same_bits(
    killed: Path, data: Path, template: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    assert go(killed, moved).summary["status"] == "finished"
    assert sha256_of(killed / MODEL) == sha256_of(template / MODEL)


@pytest.mark.parametrize(
    "without", ["file", "file and summary", "file and checkpoints", "names in the file", "images in the file"]
)
def test_what_one_place_does_not_say_another_does(without: str, finished: Path, data: Path, tmp_path: Path) -> None:
    path = finished / "fingerprint.json"
    found = json.loads(path.read_text())
    assert json.loads((finished / "summary.json").read_text())["fingerprint"] == found == kept_fingerprint(finished)
    if "summary" in without:
        summary = json.loads((finished / "summary.json").read_text())
        (finished / "summary.json").write_text(json.dumps(summary | {"fingerprint": ["of", "somebody"]}))
    if "checkpoints" in without:
        shutil.rmtree(finished / "checkpoints")
    if without == "images in the file":
        path.write_text(json.dumps({WEIGHTS: found[WEIGHTS]}))
    elif without == "names in the file":
        path.write_text("{}")
    else:
        path.unlink()
    assert kept_fingerprint(finished) == found
    with pytest.raises(ValueError, match=r"run holds a run .*training images in data.root was sha256 \w+, now sha256"):
        go(finished, other_labels(data, tmp_path / "other"))
    assert go(finished, data).summary["status"] == "finished"


def test_two_places_that_contradict_each_other_are_refused(finished: Path, data: Path) -> None:
    path = finished / "fingerprint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {IMAGES["val"]: "0" * 64}))
    with pytest.raises(ValueError, match=r"fingerprint.json and summary.json name different validation images in data"):
        go(finished, data)


def test_data_replaced_in_its_folder_while_the_run_was_stopped_is_refused(
    killed: Path, data: Path, tmp_path: Path
) -> None:
    (killed / "fingerprint.json").unlink()  # the checkpoint knows it too
    with pytest.raises(ValueError, match=r"run holds a run .*training images in data.root was"):
        go(killed, other_labels(data, tmp_path / "other"))


def test_a_path_that_an_old_checkpoint_holds_is_no_digest_of_weights(killed: Path) -> None:
    (killed / "fingerprint.json").unlink()
    state = json.loads((newest(killed) / STATE).read_text())
    state["meta"]["config"][WEIGHTS] = "weights/first.safetensors"
    (newest(killed) / STATE).write_text(json.dumps(state))
    assert set(kept_fingerprint(killed)) == {*IMAGES.values(), CLASSES, STATISTICS, CORRECTIONS}


def test_a_run_from_before_the_fingerprint_goes_on_and_is_pinned_from_there(killed: Path, data: Path) -> None:
    (killed / "fingerprint.json").unlink()
    state = json.loads((newest(killed) / STATE).read_text())
    state["meta"]["config"] = {key: v for key, v in state["meta"]["config"].items() if "images in" not in key}
    (newest(killed) / STATE).write_text(json.dumps(state))
    manifest = json.loads((newest(killed) / MANIFEST).read_text())
    about = {"bytes": (newest(killed) / STATE).stat().st_size, "sha256": sha256_of(newest(killed) / STATE)}
    (newest(killed) / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"] | {STATE: about}}))
    assert go(killed, data).summary["steps"] == STEPS
    assert "training images in data.root" in json.loads((killed / "fingerprint.json").read_text())


def test_the_weights_a_run_began_from_are_pinned_and_their_path_may_move(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rgb = timm.create_model("convnext_atto", **ATTO).state_dict()
    first, moved, other = (
        tmp_path / "first.safetensors",
        tmp_path / "m" / "moved.safetensors",
        tmp_path / "o.safetensors",
    )
    moved.parent.mkdir()
    save_file(rgb, first)
    shutil.copy(first, moved)
    save_file({key: value + 1 for key, value in rgb.items()}, other)
    run, atto = tmp_path / "run", {"name": "convnext_atto", "options": ATTO}

    def begin(weights: Path | None) -> fmnist.RunResults:
        return go(run, data, model=atto | ({"weights": str(weights)} if weights else {}), augment={"size": 32})

    assert begin(first).summary["status"] == "finished"
    for unfinished in (False, True):
        if unfinished:
            (run / "summary.json").unlink()
        with pytest.raises(ValueError, match=r"model.weights was sha256 \w+, now none"):
            begin(None)
        with pytest.raises(ValueError, match=r"model.weights was sha256 \w+, now sha256"):
            begin(other)
        with pytest.raises(ValueError, match="model.weights: .*gone.safetensors cannot be read: no such file"):
            begin(tmp_path / "gone.safetensors")
        assert begin(moved).summary["status"] == "finished"
    trained = open_trained(run)
    assert trained.fingerprint["model.weights"] == sha256_of(first)


def test_a_digest_is_of_images_labels_and_shapes(data: Path) -> None:
    split = Split.load("test", DataConfig(root=str(data)), torch.device("cpu"))
    swapped = Split(images=split.images.flip(0), labels=split.labels)
    relabelled = Split(images=split.images, labels=split.labels.flip(0))
    reshaped = Split(images=split.images.view(-1, 14, 56), labels=split.labels)
    assert len({s.digest for s in (split, swapped, relabelled, reshaped)}) == 4
    assert split.digest == Split.load("test", DataConfig(root=str(data)), torch.device("cpu")).digest


# --- weights ---------------------------------------------------------------------------------------------------------


def test_the_weights_that_a_finished_run_has_lost_are_made_again(finished: Path, data: Path) -> None:
    before, kept = sha256_of(finished / MODEL), json.loads((finished / "summary.json").read_text())
    (finished / MODEL).unlink()
    said = command(checkpoint_main, finished, status=1, lines=None)
    assert f"{finished / MODEL} is lost: the command that trained the run makes it again" in said
    go(finished, data)
    after = json.loads((finished / "summary.json").read_text())
    assert sha256_of(finished / MODEL) == before == after["weights_sha256"]
    same = ("status", "steps", "weights_step", "val.top1", "temperature")
    assert [after[name] for name in same] == [kept[name] for name in same]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["prefix"] == "train"] == list(range(1, STEPS + 1))  # none anew
    command(checkpoint_main, finished, lines=None)


def test_flipped_bits_of_a_finished_runs_weights_are_found_by_every_command(finished: Path) -> None:
    assert json.loads((finished / "summary.json").read_text())["weights_sha256"] == sha256_of(finished / MODEL)
    content = bytearray((finished / MODEL).read_bytes())
    content[-2] ^= 0x40
    (finished / MODEL).write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors does not have the hash in summary.json"):
        _ = open_trained(finished).model
    assert "does not have the hash in summary.json" in command(checkpoint_main, finished, status=1, lines=None)
    (finished / "summary.json").write_text('{"status": "finished"}')  # of a run from before: nothing to compare with
    _ = open_trained(finished).model


@pytest.mark.parametrize("kind", ["stopped before", "summary lost", "being copied"])
def test_the_newest_checkpoint_is_used_where_the_weights_are_older(
    kind: str, finished: Path, said: pytest.LogCaptureFixture
) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").write_text(json.dumps(summary | {"status": "stopped", "steps": 2}))
    step = 4
    if kind == "summary lost":
        (finished / "summary.json").unlink()
    if kind == "being copied":  # while it trained: half of the newest one
        (newest(finished) / MODEL).write_bytes(b"half")
        step = 3
    trained = open_trained(finished)
    assert (trained.checkpoint, trained.name) == (f"step_{step:08d}", f"run step {step}")
    assert trained.digest == sha256_of(newest(finished).parent / f"step_{step:08d}" / MODEL)
    assert f"step_{step:08d}, its newest valid checkpoint, is used" in said.text


def test_a_stopped_run_gives_its_best_weights(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").write_text(json.dumps(summary | {"status": "stopped"}))
    assert open_trained(finished).weights == finished / MODEL


def test_a_checkpoint_dropped_between_open_and_load_gives_way_to_the_next(
    killed: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    import fmnist.trained as module

    real = module.read_tensors_and_digest

    def drop_first(path: Path) -> Any:
        if path.parent.name == "step_00000002":
            shutil.rmtree(path.parent)
        return real(path)

    monkeypatch.setattr(module, "read_tensors_and_digest", drop_first)
    assert open_trained(killed).checkpoint == "step_00000001"
    assert open_expected(killed, os.environ.get("FMNIST_DATA")).trained.checkpoint == "step_00000001"


def test_all_listed_checkpoints_dropped_while_they_are_verified_means_a_new_look(
    killed: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    checkpoints, listed = Checkpoints(killed / "checkpoints", 1, {}), [[7, 8]]
    real = Checkpoints.steps
    monkeypatch.setattr(Checkpoints, "steps", lambda self: listed.pop() if listed else real(self))
    assert checkpoints.newest_good() == checkpoints.path(2)
    assert "skipped" not in said.text


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_file_managers_file_is_a_warning(killed: Path, said: pytest.LogCaptureFixture) -> None:
    for path in (killed / "checkpoints").iterdir():
        (path / ".DS_Store").touch()
    (killed / "checkpoints" / ".DS_Store").touch()
    (newest(killed) / EMA).write_bytes(b"planted")  # not in the manifest, so not the moving average
    assert open_trained(killed).weights == newest(killed) / MODEL
    assert "holds files that are not of the checkpoint" in said.text and ".DS_Store" in said.text


@pytest.mark.parametrize("file", [MANIFEST, MODEL, OPTIMIZER])
def test_what_may_not_be_read_is_said_and_neither_skipped_nor_called_damaged(
    file: str, killed: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(f"step_00000002/{file}"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    for action in (lambda: go(killed, data), lambda: open_trained(killed)):
        with pytest.raises(ValueError, match=rf"step_00000002/{file} cannot be read: permission denied") as error:
            action()
        assert "overwrite" not in str(error.value) and "start again" not in str(error.value)


def test_a_folder_of_checkpoints_that_may_not_be_read_is_no_new_start(
    killed: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.listdir

    def refuse(path: Any = ".") -> list[str]:
        if str(path).endswith("checkpoints"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ValueError, match="run/checkpoints cannot be read: permission denied"):
        go(killed, data)


@pytest.mark.parametrize("listed", [[], [STATE], [STATE, MODEL], ["../../config.yaml"]])
def test_a_manifest_names_the_files_that_a_checkpoint_needs(listed: list[str], killed: Path) -> None:
    planted = killed / "checkpoints/step_99999999"
    shutil.copytree(newest(killed), planted)
    whole = json.loads((planted / MANIFEST).read_text())
    (planted / MANIFEST).write_text(json.dumps(whole | {"files": {k: whole["files"].get(k, {}) for k in listed}}))
    with pytest.raises(ValueError, match="step_99999999/manifest.json"):
        verify(planted)
    assert open_trained(killed).checkpoint == "step_00000002"


def test_all_damaged_is_no_advice_to_delete(killed: Path, data: Path) -> None:
    for path in (killed / "checkpoints").glob("step_*"):
        (path / MANIFEST).write_text(json.dumps({"format": FORMAT + 1, "files": {}}))  # whole, of a later version
    with pytest.raises(
        ValueError, match=f"holds no valid checkpoint .*format {FORMAT + 1}.* another --output_dir"
    ) as error:
        go(killed, data)
    assert "overwrite" not in str(error.value)


def test_a_restart_with_nothing_left_to_train_has_no_speed(finished: Path, data: Path) -> None:
    (finished / "summary.json").unlink()
    assert go(finished, data).summary["images_per_second"] is None


def test_strange_words_in_a_checkpoint_about_itself_end_nothing(
    killed: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = ({"config": 3, "versions": []}, 7, {"model": "\x1b[2J", "versions": {"torch": "\x1b[31m1.0\nred"}})
    for meta in strange:
        state = json.loads((newest(killed) / STATE).read_text())
        (newest(killed) / STATE).write_text(json.dumps(state | {"meta": meta}))
        manifest = json.loads((newest(killed) / MANIFEST).read_text())
        about = {"bytes": (newest(killed) / STATE).stat().st_size, "sha256": sha256_of(newest(killed) / STATE)}
        (newest(killed) / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"] | {STATE: about}}))
        assert "\x1b" not in command(checkpoint_main, killed, status=None, lines=None)
    assert go(killed, data).summary["steps"] == STEPS
    shown = capsys.readouterr().err
    assert "written with torch [31m1.0 red" in shown and "\x1b" not in shown


def test_tensors_of_another_type_are_not_cast_in_silence(finished: Path) -> None:
    from fmnist.checkpoint.tensors import read_tensors

    tensors = read_tensors(finished / MODEL)
    (finished / "summary.json").write_text('{"status": "finished"}')
    save_file({key: value.half() for key, value in tensors.items()}, finished / MODEL)
    with pytest.raises(ValueError, match=r"does not fit the model: .* is torch.float16 not torch.float32"):
        _ = open_trained(finished).model
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, finished / MODEL)
    with pytest.raises(ValueError, match="float8_e4m3fn, which no run writes"):
        _ = open_trained(finished).model


# --- several processes -----------------------------------------------------------------------------------------------


class Ranks(Processes):
    """What one process knows of the others: their words, as gather brings them."""

    def __init__(self, *others: Any) -> None:
        super().__init__(0, 1)
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_the_first_difference_between_ranks_is_named() -> None:
    seen, other = {"in runs/cnn": "step 80"}, {"in runs/cnn": "no checkpoint"}
    Ranks(seen, seen).agree(seen, "is it shared?")
    with pytest.raises(ValueError, match="rank 2 sees no checkpoint in runs/cnn, rank 0 step 80: is it shared?"):
        Ranks(seen, other).agree(seen, "is it shared?")


def test_all_that_changes_what_processes_do_together_is_compared_between_them() -> None:
    shared = of_all_ranks(Config())
    assert {"evaluation.batch_size", "batch.micro_batch_size", "log.every_steps", "evaluation.test", "dry_run"} <= set(
        shared
    )
    assert not {"output_dir", "data.root", "model.weights", "threads"} & set(shared)


def test_a_checkpoint_of_another_run_is_not_taken_for_this_ones(killed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(killed, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("seed: 0", "seed: 7"))
    for name in ("model.safetensors", "summary.json"):
        (other / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"step_\d+ is of another run: seed was 0, now 7"):
        open_trained(other)


def test_what_fails_on_one_rank_fails_on_all_with_its_words() -> None:
    assert Ranks("").together(lambda: 3) == 3
    with pytest.raises(ValueError, match="train-labels: no such file"):
        Ranks("train-labels: no such file").together(lambda: 3)


def test_options_are_compared_by_their_names() -> None:
    Ranks({"as RUN": '["a"]', "as --tta": "null"}).agree_on_options({"RUN": ["a"], "--tta": None})
    with pytest.raises(ValueError, match="rank 1 sees true as --quick, rank 0 false: give all processes the same opt"):
        Ranks({"as --quick": "true"}).agree_on_options({"--quick": False})


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two working directories, as two machines without a shared disk have them."""
    places = tmp_path / "machine0", tmp_path / "machine1"
    for place in places:
        place.mkdir()
    return places


def on_two_machines(
    places: tuple[Path, Path], *args: object, own: tuple[list[object], list[object]] = ([], [])
) -> list[tuple[int, str]]:
    """Run a script as rank 0 and 1, each in its own working directory and with more arguments of its own.

    Returns:
        Their statuses and messages.
    """
    with free_socket() as probe:
        port = probe.getsockname()[1]
    children = []
    for rank, place in enumerate(places):
        env = environment() | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, *map(str, [*args, *own[rank]])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        children.append(subprocess.Popen(command, cwd=place, env=env, text=True, **pipes))  # type: ignore[call-overload]
    said = [child.communicate(timeout=200) for child in children]
    return [(child.returncode, out + err) for child, (out, err) in zip(children, said, strict=True)]


@pytest.mark.thorough
def test_two_machines_without_a_shared_disk_are_refused_before_a_step_and_evaluate_from_one(
    two: tuple[Path, Path], killed: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, two[0] / "run")
    config = ["--config", "run/config.yaml"]
    (two[1] / "run").mkdir()
    shutil.copy(killed / "config.yaml", two[1] / "run" / "config.yaml")
    before = sha256_of(two[0] / "run/metrics.jsonl")
    ended = list(on_two_machines(two, ROOT / "train.py", *config, "--output_dir", "run"))
    said = "\n".join(text for _, text in ended)
    assert [status for status, _ in ended] == [2, 2], said
    line = "rank 1 sees no checkpoint in run, rank 0 step 2: output_dir must be shared by all processes"
    assert said.count(line) == 1 and "Traceback" not in said  # one of the two says it for both
    assert sha256_of(two[0] / "run/metrics.jsonl") == before

    # An older copy on the other machine: both use what the main process has.
    shutil.rmtree(two[1] / "run")
    shutil.copytree(killed, two[1] / "run")
    shutil.rmtree(two[1] / "run/checkpoints/step_00000002")
    ended = on_two_machines(two, ROOT / "evaluate.py", "run", "--quick")
    assert [status for status, _ in ended] == [0, 0], ended
    found = json.loads((two[0] / "run/evaluation/step_00000002/test/metrics.json").read_text())
    assert found["top1"] == fmnist.open_run(two[0] / "run").evaluate("test")["top1"]
    assert not (two[1] / "run/evaluation/step_00000001").exists()


@pytest.mark.thorough
def test_processes_that_evaluate_may_spell_a_path_in_two_ways_and_have_to_read_the_same(
    two: tuple[Path, Path], finished: Path, data: Path, tmp_path: Path
) -> None:
    command = (ROOT / "evaluate.py", "--quick", finished)
    (two[0] / "here").symlink_to(data)
    (ended, said), (other, _) = on_two_machines(two, *command, own=(["--data.root", "here"], ["--data.root", data]))
    assert (ended, other) == (0, 0), said

    changed = other_labels(data, tmp_path / "other", "t10k")
    wrong: tuple[tuple[object, str], ...] = (
        (["--data.root", changed], r"rank 1 sees sha256 \w+ as test images, rank 0 sha256 \w+: all processes have to"),
        (["--split", "val"], 'rank 1 sees "val" as --split, rank 0 null: give all processes the same options'),
    )
    for own, line in wrong:
        ended = on_two_machines(two, *command, own=(["--data.root", data], ["--data.root", data, *own]))  # type: ignore[misc,assignment]
        assert [status for status, _ in ended] == [2, 2], ended
        assert len(re.findall(line, "".join(text for _, text in ended))) == 1 and "Traceback" not in str(ended), ended
