"""Distillation: targets are the labels and the teachers' mean probabilities, exact on any process count, and pinned."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forks import Forks, difference
from safetensors.torch import load_file, save_file
from small import write_small_data
from test_exactness import PLAIN, make_config
from test_start_from_run import MODELS, go

import fmnist
from fmnist.checkpoint.contents import MODEL
from fmnist.config.parse import parse_config
from fmnist.config.schema import AugmentConfig, DataConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.split import Split
from fmnist.trained import open_trained


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return [go(folder / kind, data, MODELS[kind]).directory for kind in ("mlp", "cnn")]


def taught(run: Path, data: Path, teacher: Any, **options: Any) -> fmnist.RunResults:
    return fmnist.train(
        "configs/mlp.yaml",
        output_dir=str(run),
        model=MODELS["mlp"] | {"precision": "fp32"},
        data={"root": str(data), "val_size": 500},
        augment={"size": 32},
        batch={"global_batch_size": 32},
        schedule={"steps": 4, "warmup_epochs": 0.0},
        evaluation={"every_steps": 2, "test": False},
        optim={"teacher": teacher} | options,
        log={"every_steps": 1, "wandb": "disabled"},
    )


def test_a_batch_has_the_targets_of_its_samples_and_mixes_them() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    targets = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    split = Split(images=torch.zeros(4, 28, 28, dtype=torch.uint8), labels=labels)
    loader = Loader(split, global_batch_size=4, seed=0)
    for cfg in (AugmentConfig(size=28), AugmentConfig(size=28, mixup_alpha=0.2)):
        augment = Augment(cfg, num_classes=10, mean=(0.3,), std=(0.3,))
        (batch,) = loader.aiming_at(targets).micro_batches(0)
        (plain,) = loader.micro_batches(0)
        assert batch.split.targets is targets and torch.equal(batch.indices, plain.indices)
        images, found = augment(batch)
        assert torch.equal(images, augment(plain)[0])
        if not cfg.mixes:
            assert torch.equal(found, targets[batch.indices])
            continue
        hard = F.one_hot(labels, 10).float()
        (same,) = loader.aiming_at(hard).micro_batches(0)
        assert torch.equal(augment(same)[1], augment(plain)[1])  # labels as targets are the labels
        share = (augment(plain)[1] * hard[batch.indices]).sum(1, keepdim=True)
        assert torch.allclose(found, targets[batch.indices] * share + targets[batch.partners] * (1 - share))


def test_targets_are_the_labels_and_the_mean_of_the_teachers(
    teachers: list[Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[torch.Tensor] = []
    aiming_at = Loader.aiming_at
    monkeypatch.setattr(Loader, "aiming_at", lambda self, targets: seen.append(targets) or aiming_at(self, targets))
    run = taught(tmp_path / "run", data, list(map(str, teachers)), distill_weight=0.25).directory
    train = Split.load("train", DataConfig(root=str(data), val_size=500))
    chances = [open_trained(teacher)(train.images)[0].softmax(1) for teacher in teachers]
    expected = 0.75 * F.one_hot(train.labels, 10) + 0.25 * (chances[0] + chances[1]) / 2
    assert torch.allclose(seen[0], expected, atol=1e-6) and seen[0].dtype == torch.float32
    right = 100 * (chances[0].argmax(1) == train.labels).double().mean()
    assert f"teacher {teachers[0]}: right on {right:.2f} % of the training images" in capsys.readouterr().err
    assert f"taught by {teachers[0]}, {teachers[1]}\n" in (run / "train.log").read_text()
    weights = load_file(run / MODEL)
    alone = go(tmp_path / "alone", data, MODELS["mlp"], lr=0.001).directory
    assert not torch.equal(weights["head.bias"], load_file(alone / MODEL)["head.bias"])


@pytest.mark.thorough
def test_the_teachers_bytes_are_pinned_and_not_their_places(teachers: list[Path], data: Path, tmp_path: Path) -> None:
    one, other = (Path(shutil.copytree(teacher, tmp_path / teacher.name)) for teacher in teachers)
    run = tmp_path / "run"
    taught(run, data, [str(one), str(other)])
    pinned = json.loads((run / "fingerprint.json").read_text())["optim.teacher"]
    assert len(pinned) == 64 and pinned != json.loads((one / "fingerprint.json").read_text())["optim.teacher"] == "none"
    (run / "summary.json").unlink()  # so that it is not finished
    moved = other.rename(tmp_path / "moved")
    taught(run, data, [str(one), str(moved)])
    for changed, said in (([str(moved), str(one)], r"optim.teacher was sha256 \w+, now sha256"), (None, "now none")):
        with pytest.raises(ValueError, match=said):
            taught(run, data, changed)
    with pytest.raises(ValueError, match=r"optim.distill_weight was 0.5, now 0.75"):
        taught(run, data, [str(one), str(moved)], distill_weight=0.75)
    shutil.rmtree(moved)
    assert open_trained(run).cfg.optim.teachers == [str(one), str(moved)]  # it opens without them


def test_what_cannot_teach_is_one_line(
    teachers: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = Path(shutil.copytree(teachers[0], tmp_path / "strange"))
    about = json.loads((strange / "data.json").read_text())
    names = about["class_names"]
    damaged = Path(shutil.copytree(teachers[0], tmp_path / "damaged"))
    tensors = load_file(damaged / MODEL)
    save_file(tensors | {"head.bias": tensors["head.bias"] + 1}, damaged / MODEL)
    (strange / "data.json").write_text(json.dumps(about | {"class_names": [*names[1:], names[0]]}))
    fingerprint = strange / "fingerprint.json"
    content = json.loads(fingerprint.read_text())
    fingerprint.write_text(json.dumps({key: value for key, value in content.items() if "class" not in key}))
    summary = json.loads((strange / "summary.json").read_text())
    summary["fingerprint"] = {key: value for key, value in summary["fingerprint"].items() if "class" not in key}
    (strange / "summary.json").write_text(json.dumps(summary))
    for path in (strange / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"optim.teacher: .*strange knows other classes: the same in another order"):
        taught(tmp_path / "a", data, str(strange))
    with pytest.raises(ValueError, match="damaged"):
        taught(tmp_path / "b", data, str(damaged))
    for flags, said in (
        (["--optim.teacher", "nowhere"], "optim.teacher: there is no run directory nowhere"),
        (["--optim.teacher", f"[{teachers[0]}, nowhere]"], "optim.teacher: there is no run directory nowhere"),
        (["--optim.teacher", "[]"], "optim.teacher is []; expected "),
        (["--optim.teacher", str(teachers[0]), "--output_dir", str(teachers[0])], "is of the run in output_dir itself"),
        (["--optim.distill_weight", "0.7"], "optim.distill_weight 0.7 has no effect: optim.teacher is null"),
    ):
        with pytest.raises(SystemExit):
            parse_config([*flags, *([] if "--output_dir" in flags else ["--output_dir", str(tmp_path / "new")])])
        assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def forks() -> Any:
    started = Forks()
    yield started
    started.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_taught_run_that_is_killed_goes_on_to_the_same_bits(forks: Forks, tmp_path: Path, processes: int) -> None:
    config = make_config(PLAIN | {"model": "mlp", "ema": True, "mixing": "both"})
    forks.start(tmp_path / "teacher", config)
    config |= {"seed": 1, "exact": 2}
    config["optim"] |= {"teacher": str(tmp_path / "teacher")}
    forks.start(tmp_path / "whole", config)
    forks.start(tmp_path / "run", config, processes, strike=[13, "update"])
    forks.start(tmp_path / "run", config, processes)
    assert difference(tmp_path / "run", tmp_path / "whole") == []
    without = config | {"optim": config["optim"] | {"teacher": None}}
    forks.start(tmp_path / "without", without)
    assert MODEL in difference(tmp_path / "without", tmp_path / "whole")
