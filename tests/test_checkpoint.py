"""Checkpoints: the same bits back, and never a damaged one in silence."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fmnist.checkpoint.contents import EMA, FORMAT, MODEL, OPTIMIZER, TrainState, is_checkpoint, read_state, verify
from fmnist.checkpoint.run_directory import lock_directory
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import (
    TYPES,
    apart,
    load_optimizer_tensors,
    load_strict,
    non_finite,
    optimizer_tensors,
    read_tensors,
    write_tensors,
)
from fmnist.config.conflicts import Length, without_effect
from fmnist.config.schema import Config, EvaluationConfig, OptimConfig
from fmnist.models.cnn import Cnn
from fmnist.optim import build_optimizer
from fmnist.runtime.files import sha256_of


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep_last=2, meta={"model": "test"})


def save(checkpoints: Checkpoints, step: int, best_step: int = 0) -> Path:
    tensors = {"weight": torch.full((3,), float(step)), "count": torch.tensor(step)}
    return checkpoints.save(TrainState(step=step, best_step=best_step), {MODEL: tensors, OPTIMIZER: {}})


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(
    name: str, memory_format: torch.memory_format, checkpoints: Checkpoints
) -> None:
    cfg = OptimConfig(name=name, lr=0.01)
    torch.manual_seed(0)
    model = Cnn(10, widths=(4, 8)).to(memory_format=memory_format)
    optimizer = build_optimizer(model, cfg)
    for seed in range(3):
        learn(model, optimizer, seed)
    state = TrainState(step=3, best_val={"top1": 0.5}, best_step=2, train_seconds=1.5)
    path = checkpoints.save(state, {MODEL: model.state_dict(), OPTIMIZER: optimizer_tensors(model, optimizer)})
    other = Cnn(10, widths=(4, 8)).to(memory_format=memory_format)
    other_optimizer = build_optimizer(other, cfg)
    load_strict(other, read_tensors(path / MODEL), path)
    load_optimizer_tensors(other, other_optimizer, read_tensors(path / OPTIMIZER), path)
    assert read_state(path) == state
    learn(model, optimizer, 9)
    learn(other, other_optimizer, 9)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_its_files_and_the_lock_follow_the_umask(umask: int, mode: int, checkpoints: Checkpoints) -> None:
    """As in a folder that a group shares: a colleague evaluates, and goes on with the run."""
    before = os.umask(umask)
    try:
        path = save(checkpoints, 3)
        lock_directory(path.parent).release()
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()} == dict.fromkeys(
        (MODEL, OPTIMIZER, "state.json", "manifest.json"), mode
    )
    assert (path.parent / ".lock").stat().st_mode & 0o777 == mode


def test_nothing_in_it_is_a_pickle_and_the_manifest_lists_all(checkpoints: Checkpoints) -> None:
    path = save(checkpoints, 7)
    names = {file.name for file in path.iterdir()}
    assert names == {"manifest.json", "state.json", MODEL, OPTIMIZER}
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
    verify(path)


def test_the_last_k_and_the_best_are_kept(checkpoints: Checkpoints) -> None:
    for step in range(1, 7):
        save(checkpoints, step, best_step=min(step, 2))
    assert checkpoints.steps() == [2, 5, 6]
    assert not list(checkpoints.directory.glob(".part_*"))


def save_best(checkpoints: Checkpoints, step: int, name: str = MODEL) -> Path:
    return checkpoints.save(TrainState(step=step, best_step=step), {name: {"weight": torch.full((3,), float(step))}})


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name.replace("_000000", "_") for path in checkpoints.directory.iterdir())


def test_weights_alone_are_kept_while_they_are_the_best_here_or_for_a_restart(checkpoints: Checkpoints) -> None:
    save_best(checkpoints, 1)
    save_best(checkpoints, 2)
    assert names(checkpoints) == ["best_02"] and checkpoints.newest_good() is None  # nothing resumes from it
    save(checkpoints, 3, best_step=2)
    save_best(checkpoints, 4)
    save_best(checkpoints, 5)
    assert names(checkpoints) == ["best_02", "best_05", "step_03"]  # a restart from 3 has 2 as its best
    save(checkpoints, 6, best_step=5)
    save(checkpoints, 7, best_step=5)
    assert names(checkpoints) == ["best_05", "step_06", "step_07"]
    save(checkpoints, 8, best_step=8)
    save_best(checkpoints, 9)
    save(checkpoints, 10, best_step=9)
    save(checkpoints, 11, best_step=9)
    assert names(checkpoints) == ["best_09", "step_10", "step_11"]
    save(checkpoints, 12, best_step=12)  # the full one holds them
    save_best(checkpoints, 13)
    assert names(checkpoints) == ["best_09", "best_13", "step_11", "step_12"]  # 9 is the best of 11
    for step in (14, 15, 16):
        save_best(checkpoints, step)
    assert names(checkpoints) == ["best_09", "best_16", "step_11", "step_12"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_one_that_a_restart_stepped_over_takes_nobodys_place(keep_last: int, checkpoints: Checkpoints) -> None:
    checkpoints.keep_last = keep_last
    save(checkpoints, 30, best_step=30)
    for step in (34, 35):
        shutil.copytree(checkpoints.path(30), checkpoints.path(step), dirs_exist_ok=True)
        (checkpoints.path(step) / MODEL).write_bytes(b"damaged")
    again = Checkpoints(checkpoints.directory, keep_last, {})
    assert again.newest_good() == again.path(30)
    best = save_best(again, 35)
    assert names(again) == ["best_35", "step_30"]  # what it resumed from, and the weights that were written just now
    assert again.newest_good() == again.path(30)
    verify(best)
    save(again, 60, best_step=35)
    assert again.export(35, again.directory / "out") == (sha256_of(best / MODEL), 35)
    (again.directory / "out").unlink()
    save(again, 35, best_step=35)  # written anew, it counts again
    assert 35 in again.steps()


def test_weights_alone_do_not_drop_what_a_restart_needs(checkpoints: Checkpoints) -> None:
    """The full one that was the best when the newest full one was written, however old."""
    save(checkpoints, 1, best_step=1)
    for step in (2, 3, 4):
        save(checkpoints, step, best_step=1)
    save_best(checkpoints, 5)
    assert names(checkpoints) == ["best_05", "step_01", "step_03", "step_04"]
    (checkpoints.path(4) / "state.json").unlink()  # damaged: a restart goes on from 3, and comes by 5 again
    save_best(checkpoints, 6)
    assert names(checkpoints) == ["best_06", "step_03", "step_04"]
    assert checkpoints.newest_good() == checkpoints.path(3)


def test_a_run_that_went_back_drops_weights_of_later_steps(checkpoints: Checkpoints) -> None:
    save(checkpoints, 2, best_step=2)
    save_best(checkpoints, 4)
    save(checkpoints, 3, best_step=2)  # after a restart from 2
    assert names(checkpoints) == ["step_02", "step_03"]


@pytest.mark.parametrize("name", [MODEL, EMA])
def test_weights_alone_are_verified_exported_and_read_like_a_checkpoint(
    name: str, checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full, best = save(checkpoints, 1), save_best(checkpoints, 2, name)
    assert is_checkpoint(full) and is_checkpoint(best) and not is_checkpoint(tmp_path)
    assert {file.name for file in best.iterdir()} == {"manifest.json", "state.json", name}
    assert (verify(best)[name], 2) == checkpoints.export(2, tmp_path / "out") == (sha256_of(best / name), 2)
    assert read_state(best).step == 2
    (best / name).write_bytes((best / name).read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"best_00000002/{name} is not what was written"):
        verify(best)
    assert checkpoints.export(2, tmp_path / "out") == (
        sha256_of(full / MODEL),
        1,
    )  # the newest full one, with a warning
    manifest = best / "manifest.json"
    manifest.write_text(manifest.read_text().replace(name, "other"))
    with pytest.raises(ValueError, match="does not list model.safetensors, which a checkpoint needs"):
        verify(best)


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        events.append(f"renamed to {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    save(checkpoints, 7)
    named = events.index("renamed to step_00000007")
    assert {MODEL, "state.json", ".part_step_00000007"} <= set(events[:named])
    assert any("manifest.json" in event for event in events[:named])
    assert "checkpoints" in events[named:]  # the new name itself


@pytest.mark.parametrize(
    "damage",
    ["truncate_0", "truncate_1", "truncate_half", "truncate_last", "flip", "missing", "no_manifest", "format"],
)
def test_a_damaged_newest_one_is_passed_over_with_a_warning(
    damage: str, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(checkpoints, 1), save(checkpoints, 2)
    weights, manifest = bad / MODEL, bad / "manifest.json"
    data = weights.read_bytes()
    if damage.startswith("truncate"):
        keep = {"0": 0, "1": 1, "half": len(data) // 2, "last": len(data) - 1}[damage.split("_")[1]]
        weights.write_bytes(data[:keep])
    elif damage == "flip":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "no_manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with caplog.at_level(logging.WARNING, logger="fmnist"):
        assert checkpoints.newest_good() == good
    assert len(caplog.records) == 1
    assert "step_00000002" in caplog.text


def test_only_damaged_ones_are_an_error_and_none_is_a_fresh_start(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest_good() is None
    (save(checkpoints, 1) / MODEL).unlink()
    with pytest.raises(ValueError, match="holds no valid checkpoint"):
        checkpoints.newest_good()


def test_a_save_that_dies_leaves_the_older_one(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(checkpoints, 1)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        save(checkpoints, 2)
    monkeypatch.undo()
    assert checkpoints.newest_good() == good
    save(checkpoints, 3)
    assert not list(checkpoints.directory.glob(".part_*"))


def test_tensors_that_do_not_fit_are_named() -> None:
    model = Cnn(10, widths=(4, 8))
    tensors = dict(model.state_dict())
    tensors["head.weight"] = torch.zeros(7, 8)
    tensors["stray"] = tensors.pop("head.bias")
    with pytest.raises(ValueError) as caught:
        load_strict(model, tensors, Path("some/file"))
    for part in (
        "some/file",
        "head.bias missing",
        "stray unexpected",
        "head.weight is [7, 8] not [10, 8]",
        "3 tensors",
    ):
        assert part in str(caught.value)


def test_a_file_of_tensors_is_that_of_the_library_and_its_hash_that_of_the_file(tmp_path: Path) -> None:
    model = Cnn(10, widths=(4, 8)).to(memory_format=torch.channels_last)  # floats and BatchNorm's counts
    state = dict(model.state_dict())
    size, digest = write_tensors(tmp_path / "model", state)
    assert (tmp_path / "model").read_bytes() == safetensors.torch.save(apart(state))
    assert (size, digest) == ((tmp_path / "model").stat().st_size, sha256_of(tmp_path / "model"))
    odd = {"none": torch.ones(0, 3), "turned": torch.ones(2, 3).T, 'a "quoted"\nümlaut': torch.tensor(7)}
    odd |= {str(kind): torch.tensor([1, 0, 1]).to(kind) for kind in TYPES}
    odd["row"] = odd["turned"][1]  # of the same memory
    write_tensors(tmp_path / "odd", odd)
    read = read_tensors(tmp_path / "odd")
    assert read.keys() == odd.keys() and all(torch.equal(read[name], odd[name]) for name in odd)
    with pytest.raises(ValueError, match="odd cannot be written: x is torch.complex64"):
        write_tensors(tmp_path / "odd", {"x": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(OSError, match="nowhere/file cannot be written: No such file"):
        write_tensors(tmp_path / "nowhere/file", odd)


def test_copies_stay_as_they_are_and_share_no_memory() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    copies = apart({"a": tensor, "row": tensor[1]})
    tensor += 100
    copies["a"][0] = 7
    assert copies["row"].tolist() == [3, 4, 5] and copies["a"][1].tolist() == [3, 4, 5]


def test_the_weights_are_exported_without_a_look_at_the_optimizer(checkpoints: Checkpoints, tmp_path: Path) -> None:
    good, bad = save(checkpoints, 1), save(checkpoints, 2)
    (bad / OPTIMIZER).write_bytes(b"damaged")
    assert checkpoints.export(2, tmp_path / "out") == (sha256_of(bad / MODEL), 2) == (sha256_of(tmp_path / "out"), 2)
    (bad / MODEL).write_bytes((bad / MODEL).read_bytes()[:-1] + b"x")
    assert checkpoints.export(2, tmp_path / "out") == (sha256_of(good / MODEL), 1)


def test_non_finite_values_are_found_by_name() -> None:
    tensors = {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2), "c": torch.tensor([float("inf")])}
    assert non_finite(tensors | {"n": torch.tensor(3)}) == ["a", "c"]


def test_the_best_changes_only_for_a_better_top1() -> None:
    state = TrainState()
    for step, top1 in enumerate([0.5, 0.7, 0.7, 0.6], start=1):
        state.step = step
        state.update_best({"top1": top1})
    assert (state.best_step, state.best_val) == (2, {"top1": 0.7})
    without = TrainState(step=9)
    without.update_best({})
    assert without.best_step == 9


def best_steps(vals: list[dict[str, float]]) -> tuple[list[int], dict[str, float]]:
    """Return the best step after each of some validations, and the numbers of the last."""
    state, best = TrainState(), []
    for state.step, val in enumerate(vals, start=1):
        state.update_best(val)
        best.append(state.best_step)
    return best, state.best_val


def test_the_best_of_a_smaller_image_size_gives_way_to_the_first_of_a_larger_one() -> None:
    vals = [{"top1": 0.9, "size": 20.0}, {"top1": 0.8, "size": 20.0}, {"top1": 0.7}, {"top1": 0.6}, {"top1": 0.7}]
    assert best_steps(vals) == ([1, 1, 3, 3, 3], {"top1": 0.7})


def test_a_run_continued_at_smaller_images_keeps_its_best_until_they_are_as_large_again() -> None:
    vals = [{"top1": 0.8}, {"top1": 0.9, "size": 20.0}, {"top1": 0.95, "size": 24.0}, {"top1": 0.79}, {"top1": 0.81}]
    assert best_steps(vals) == ([1, 1, 1, 1, 5], {"top1": 0.81})


@pytest.mark.parametrize(("by", "best_step"), [("top1", 2), ("macro_f1", 3), ("loss", 1)])
def test_the_best_is_by_the_number_that_is_asked_for(by: str, best_step: int) -> None:
    state, vals = TrainState(), [
        {"top1": 0.5, "macro_f1": 0.4, "loss": 0.3},
        {"top1": 0.7, "macro_f1": 0.5, "loss": 0.4},
        {"top1": 0.6, "macro_f1": 0.6, "loss": 0.3},
        {"top1": 0.7, "macro_f1": 0.6, "loss": float("nan")},
    ]  # fmt: skip
    for state.step, val in enumerate(vals, start=1):
        state.update_best(val, by)
    assert state.best_step == best_step and state.best_val == vals[best_step - 1]


def test_a_choice_without_validation_images_has_no_effect_and_that_is_said() -> None:
    cfg = replace(Config(), evaluation=EvaluationConfig(best="loss"))
    assert without_effect(cfg, Length(4000, 100)) == []
    (line,) = without_effect(cfg, Length(4000, 100, num_val=0))
    assert line == "evaluation.best loss has no effect: there are no validation images"


def test_a_first_number_that_is_a_nan_has_weights_and_gives_way() -> None:
    state = TrainState(step=1)
    state.update_best({"top1": 0.1, "loss": float("nan")}, "loss")
    assert (state.best_step, state.best_val) == (1, {"top1": 0.1})  # JSON has no NaN
    state.step = 2
    state.update_best({"top1": 0.1, "loss": 9.0}, "loss")
    assert (state.best_step, state.best_val) == (2, {"top1": 0.1, "loss": 9.0})
