"""A run that begins from the weights of another run or checkpoint of ours, by any model."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small import newest

import fmnist
from fmnist.apps.export.model_card import _training
from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER, TrainState, read_state
from fmnist.checkpoint.store import Checkpoints
from fmnist.config.parse import parse_config
from fmnist.config.same_run import run_yaml
from fmnist.config.schema import Config, ModelConfig
from fmnist.data.fashion_mnist import INFO
from fmnist.data.info import DATA_FILE
from fmnist.models import build_model
from fmnist.runtime.files import sha256_of
from fmnist.trained import open_trained
from fmnist.training.start_from_run import start_from_run

NAMES = INFO.class_names
ATTO = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2, "conv_mlp": False}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "options": {"width": 16}},
    "cnn": {"name": "cnn", "options": {"widths": [4, 8]}},
    "hybrid": {"name": "hybrid", "options": {"widths": [4, 8], "blocks": 1}},
    "timm": {"name": "convnext_atto", "options": ATTO},
    "pretrained": {"name": "convnext_atto", "options": ATTO},  # its first layer and statistics are those of RGB weights
}


def go(run: Path, data: Path, model: dict[str, Any], lr: float = 0.01, **options: Any) -> fmnist.RunResults:
    return fmnist.train(
        "configs/mlp.yaml",
        output_dir=str(run),
        model={"precision": "fp32"} | model,
        data={"root": str(data), "val_size": 500},
        augment={"size": 32},
        batch={"global_batch_size": 32},
        schedule={"steps": 4, "warmup_epochs": 0.0},
        evaluation={"every_steps": 2, "test": False},
        optim={"ema_decay": 0.5, "lr": lr},
        checkpoint={"keep_last": 4},
        log={"every_steps": 1, "wandb": "disabled"},
        **options,
    )


def network(
    num_classes: int = 10, image_size: int = 32, seed: int = 1, **model: Any
) -> tuple[torch.nn.Module, ModelConfig]:
    cfg = ModelConfig(**{"precision": "fp32"} | model)
    torch.manual_seed(seed)
    built, _ = build_model(cfg, num_classes=num_classes, mean=(0.3,), std=(0.3,), image_size=image_size)
    return built, cfg


@pytest.fixture(scope="module")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("rgb") / "rgb.safetensors"
    save_file(timm.create_model("convnext_atto", **ATTO).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, rgb: Path) -> dict[str, Path]:
    """What a finished run of each model leaves: weights, config and summary."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in MODELS}
    for kind, folder in found.items():
        model, cfg = network(seed=7, **MODELS[kind] | ({"weights": str(rgb)} if kind == "pretrained" else {}))
        save_file(model.state_dict(), folder / MODEL)
        (folder / "config.yaml").write_text(run_yaml(replace(Config(), model=cfg, output_dir=str(folder))))
        (folder / DATA_FILE).write_text(json.dumps(INFO.to_json()))
        summary = {"status": "finished", "weights_sha256": sha256_of(folder / MODEL)}
        (folder / "summary.json").write_text(json.dumps(summary))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path, rgb: Path) -> dict[str, Path]:
    """Two finished runs."""
    folder = tmp_path_factory.mktemp("trained")
    began: dict[str, dict[str, Any]] = {"cnn": {}, "pretrained": {"weights": str(rgb)}}
    return {kind: go(folder / kind, data, MODELS[kind] | more).directory for kind, more in began.items()}


def own(kind: str, weights: Path) -> dict[str, Any]:
    return MODELS[kind] | {"weights": str(weights), "pretrained": kind == "pretrained"}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["cnn", "pretrained"])
def test_a_run_begins_with_the_weights_of_another_and_pins_them(
    kind: str, trained: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    source, run = trained[kind], tmp_path / "run"
    # At learning rate 0 nothing moves: the new run's weights are those it began from, statistics of norms apart.
    done = go(run, data, own(kind, source), lr=0.0)
    before, after = load_file(source / MODEL), load_file(run / "checkpoints/step_00000004" / MODEL)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, after[name]), name
    assert json.loads((run / "fingerprint.json").read_text())["model.weights"] == sha256_of(source / MODEL)
    assert done.trained.augment.mean == open_trained(source).augment.mean
    assert f"from {source}" in (run / "train.log").read_text()
    shutil.copytree(run, tmp_path / "alone")  # it opens where the other is gone
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    alone = replace(open_trained(tmp_path / "alone"))
    assert torch.equal(alone(images)[0], done.trained(images)[0])


@pytest.mark.thorough
def test_a_checkpoint_gives_its_own_weights_and_a_stopped_run_its_newest(
    trained: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(trained["cnn"], tmp_path / "other"))
    for name in (other / "summary.json", other / MODEL):
        name.unlink()  # as kill -9 leaves it
    for weights, step in ((other / "checkpoints/step_00000002", 2), (other, 4)):
        run = tmp_path / f"from_{step}"
        go(run, data, own("cnn", weights), lr=0.0)
        average = load_file(other / f"checkpoints/step_{step:08d}" / EMA)  # the weights to use
        assert torch.equal(load_file(run / "checkpoints/step_00000004" / MODEL)["head.weight"], average["head.weight"])


@pytest.mark.thorough
def test_it_resumes_and_other_weights_are_refused(trained: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", Path(shutil.copytree(trained["cnn"], tmp_path / "copy"))
    go(run, data, own("cnn", copy))
    whole, other = (run / MODEL).read_bytes(), 4 if read_state(newest(copy)).best_step == 2 else 2
    for path in (run / "summary.json", run / MODEL):
        path.unlink()
    shutil.rmtree(run / "checkpoints/step_00000004")
    moved = copy.rename(tmp_path / "moved")  # the place may change, the bytes may not
    with pytest.raises(ValueError, match=r"model.weights was sha256 \w+, now none"):
        go(run, data, MODELS["cnn"])
    with pytest.raises(ValueError, match=r"model.weights was sha256 \w+, now sha256"):
        go(run, data, own("cnn", moved / f"checkpoints/step_{other:08d}"))
    with pytest.raises(ValueError, match="model.weights: .*copy cannot be read: no such file"):
        go(run, data, own("cnn", copy))
    go(run, data, own("cnn", moved))
    assert (run / MODEL).read_bytes() == whole


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("num_classes", [3, 1000])
def test_other_classes_get_a_new_head_and_that_is_said_once(
    kind: str, num_classes: int, sources: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fmnist")
    model, cfg = network(num_classes, **own(kind, sources[kind]))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_from_run(model, cfg, NAMES[:num_classes] if num_classes < 10 else range(num_classes))
    before = load_file(sources[kind] / MODEL)
    for name, tensor in model.state_dict().items():
        is_head = name.startswith(("head.fc", "head.weight", "head.bias"))
        assert torch.equal(tensor, fresh[name] if is_head else before[name]), name
    assert caplog.text.count("the head starts from new weights") == 1


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_takes_all_tensors_of_the_same_classes(kind: str, sources: dict[str, Path]) -> None:
    model, cfg = network(**own(kind, sources[kind]))
    assert start_from_run(model, cfg, NAMES) == sha256_of(sources[kind] / MODEL)
    for name, tensor in load_file(sources[kind] / MODEL).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_same_number_of_other_classes_gets_a_new_head_too(sources: dict[str, Path], tmp_path: Path) -> None:
    model, cfg = network(**own("cnn", sources["cnn"]))
    fresh = model.head.weight.clone()
    start_from_run(model, cfg, [f"class {i}" for i in range(10)])
    assert torch.equal(model.head.weight, fresh)
    start_from_run(model, cfg, NAMES)
    assert torch.equal(model.head.weight, load_file(sources["cnn"] / MODEL)["head.weight"])
    # What the other run keeps of its classes counts.
    other = Path(shutil.copytree(sources["cnn"], tmp_path / "other"))
    (other / "data.json").write_text(json.dumps(replace(INFO, class_names=NAMES[::-1]).to_json()))
    model, cfg = network(**own("cnn", other))
    start_from_run(model, cfg, NAMES[::-1])
    assert torch.equal(model.head.weight, load_file(other / MODEL)["head.weight"])


@pytest.mark.parametrize(
    ("source", "kind", "change", "message"),
    [
        ("cnn", "mlp", {}, "is a run of cnn, model.name is mlp; valid: cnn"),
        ("cnn", "cnn", {"options": {"widths": [4, 16]}}, "does not fit cnn as configured: .*of another shape"),
        ("mlp", "mlp", {"options": {"width": 8}}, "does not fit mlp as configured"),
        ("pretrained", "timm", {}, "began from pretrained weights.*valid: --model.pretrained true"),
        ("timm", "pretrained", {}, "did not begin from pretrained weights.*valid: --model.pretrained false"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    source: str, kind: str, change: dict[str, Any], message: str, sources: dict[str, Path]
) -> None:
    model, cfg = network(**own(kind, sources[source]) | change)
    with pytest.raises(ValueError, match=message) as caught:
        start_from_run(model, cfg, NAMES)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.weights: ")


def test_another_image_size_of_an_mlp_is_one_line(sources: dict[str, Path]) -> None:
    model, cfg = network(image_size=28, **own("mlp", sources["mlp"]))
    with pytest.raises(ValueError, match=r"hidden.1.weight \(16, 1024\), not \(16, 784\)"):
        start_from_run(model, cfg, NAMES)


def test_damaged_weights_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(sources["cnn"], tmp_path / "other"))
    model, cfg = network(**own("cnn", other))
    tensors = load_file(other / MODEL)
    save_file(tensors | {"head.bias": tensors["head.bias"] + 1}, other / MODEL)
    with pytest.raises(ValueError, match="does not have the hash its run names"):
        start_from_run(model, cfg, NAMES)
    state, groups = TrainState(step=2, best_step=2), {MODEL: tensors, OPTIMIZER: {}}
    damaged = Checkpoints(other / "checkpoints", 1, {}).save(state, groups)
    (damaged / MODEL).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="model.weights: .* cannot be used: .* is not what was written"):
        start_from_run(*network(**own("cnn", damaged)), NAMES)
    (other / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"cannot be used: .*config.yaml is missing"):
        start_from_run(*network(**own("cnn", other)), NAMES)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere", "there is no file nowhere"),
        ("folder.safetensors", "folder.safetensors is none of .safetensors, .pt, .pth, and no run or checkpoint"),
        ("notes.txt", "notes.txt is none of .safetensors, .pt, .pth, and no run or checkpoint"),
        ("runs/a", "runs/a is of the run in output_dir itself: give another --output_dir"),
        ("runs/a/model.safetensors", "is of the run in output_dir itself"),
        ("runs/a/checkpoints/step_00000002", "is of the run in output_dir itself"),
    ],
)
def test_what_is_no_run_is_seen_before_torch(
    weights: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.safetensors", "runs/a/checkpoints/step_00000002"):
        Path(folder).mkdir(parents=True)
    for file in ("notes.txt", "runs/a/model.safetensors"):
        Path(file).write_text("")
    with pytest.raises(SystemExit):
        parse_config(["--model.weights", weights, "--output_dir", "runs/a"])
    assert message in capsys.readouterr().err


def test_a_file_for_a_model_of_ours_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="model.weights: cnn has no pretrained weights.*: model.weights DIRECTORY"):
        network(name="cnn", weights="x.safetensors")


def test_the_model_card_names_what_it_started_from(sources: dict[str, Path]) -> None:
    trained = open_trained(sources["cnn"])
    started = replace(trained, cfg=replace(Config(), model=ModelConfig(weights="runs/other")))
    assert _training(trained, None).startswith("It was trained from scratch")
    assert _training(started, None).startswith("It started from the weights of another run")
