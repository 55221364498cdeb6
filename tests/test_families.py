"""Every family of timm trains, is saved and opened again, and gives logits and features; eight of them quickly."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import timm
import torch
import torch.nn.functional as F
from families import read_families
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import evaluate
from fmnist.apps.export.__main__ import main as export
from fmnist.apps.predict.__main__ import main as predict
from fmnist.checkpoint.tensors import apart, load_strict, read_tensors
from fmnist.config.schema import ModelConfig, OptimConfig
from fmnist.data.fashion_mnist import load
from fmnist.models import Normalization, build_model
from fmnist.models.head import feature_width, head_parameters, logits_and_features
from fmnist.optim import build_optimizer, parameter_groups

FAMILIES = [entry for entry in read_families() if not entry.get("refused")]
BATCH = 4
# What used to fail: another head than one linear layer, or no drop_path_rate.
QUICK = {
    *("resnetv2_18", "levit_128s", "deit_tiny_distilled_patch16_224", "hrnet_w18_small", "caformer_s18"),
    *("repvit_m1", "crossvit_tiny_240", "efficientformer_l1", "csatv2"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str, size: int, options: dict[str, Any]) -> tuple[nn.Module, Normalization]:
    cfg = ModelConfig(name=name, options=options)
    return build_model(cfg, num_classes=10, mean=(0.5,), std=(0.25,), image_size=size, load_weights=False)


def train(model: nn.Module, images: Tensor) -> None:
    """Make two updates, and see that each reaches every parameter: DDP waits for a gradient that never comes."""
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, head_lr_scale=2.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        loss = F.cross_entropy(model(images), torch.arange(len(images)))
        loss.backward()
        assert loss.isfinite()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
    head = {id(p) for p in head_parameters(model)}
    assert {id(p) for group in optimizer.param_groups if group["is_head"] for p in group["params"]} == head
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if id(p) in head)
    if hasattr(model, "group_matcher"):  # else layer decay is refused in one line
        layers = parameter_groups(model, OptimConfig(layer_decay=0.75))
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for group in layers for p in group["params"]} == trainable


def check_family(name: str, size: int, options: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    model, normalization = build(name, size, options)
    images = torch.randn(BATCH, len(normalization.mean), size, size)
    with torch.no_grad():
        _, features = logits_and_features(model.eval(), images)
    assert features.std(0).max() > 0  # no two images are the same; two steps may drive a ReLU before the head to zero
    train(model.train(), images)

    save_file(apart(model.state_dict()), folder / "model")
    opened, same = build(name, size, options)
    load_strict(opened, read_tensors(folder / "model"), folder / "model")
    (folder / "model").unlink()
    assert same == normalization
    with torch.no_grad():
        expected = model.eval()(images)
        before_head = model.forward_head(model.forward_features(images), pre_logits=True)
        logits, features = logits_and_features(opened.eval(), images)
        again, unchanged = logits_and_features(model, images)
    assert torch.equal(logits, expected) and torch.equal(again, expected) and torch.equal(features, unchanged)
    assert logits.shape == (BATCH, 10) and logits.isfinite().all()
    assert features.shape == (BATCH, feature_width(model)) and features.dtype == torch.float32
    assert features.isfinite().all()
    assert torch.equal(features, before_head)  # the pass for logits has not changed them


@pytest.mark.parametrize("entry", [entry for entry in FAMILIES if entry["model"] in QUICK], ids=lambda e: e["model"])
def test_a_model_with_an_unusual_head(entry: dict[str, Any], tmp_path: Path) -> None:
    check_family(entry["model"], entry["size"], entry["options"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("entry", FAMILIES, ids=lambda e: e["model"])
def test_a_family(entry: dict[str, Any], tmp_path: Path) -> None:
    check_family(entry["model"], entry["size"], entry["options"], tmp_path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data set of 62 real images, for every program, and beside it a picture from outside."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("NUM_TRAIN", 40), ("NUM_TEST", 10), ("VAL_SIZE", 12)):
            patch.setattr(small, name, count)
        patch.setenv("FMNIST_DATA", str(small.write_small_data(folder)))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        Image.fromarray(load("test")[0][0].numpy()).save(folder / "boot.png")
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("entry", FAMILIES, ids=lambda e: e["model"])
def test_every_program_takes_a_family(
    entry: dict[str, Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluate, predict and export, all in this process; seven minutes of one core, most of them the exporter's."""
    cfg = ModelConfig(name=entry["model"], options=entry["options"])
    run = small.untrained(tmp_path / "run", cfg, entry["size"])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), "--quick", "--batch_size", "5"])
    evaluate.main()
    found = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert found["num_images"] == 10
    said = small.command(predict, run, pictures / "boot.png", "--output", tmp_path / "out", "--batch_size", 8)
    assert said.startswith("1 predicted")
    assert "the largest difference" in small.command(export, run, "--to", "onnx")
    assert (run / "export/model.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [entry for entry in read_families() if entry.get("refused")], ids=lambda e: e["model"]
)
def test_a_family_that_cannot_be_trained_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        build(entry["model"], entry["size"], entry["options"])
    assert str(caught.value) == entry["refused"]


def test_the_table_holds_every_family() -> None:
    """Where timm has got a new one: python tests/families.py."""
    assert {entry["family"] for entry in read_families()} == set(timm.list_modules())
    assert {entry["model"] for entry in FAMILIES} >= QUICK


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_our_models_give_logits_and_the_features_behind_them(name: str) -> None:
    torch.manual_seed(0)
    model, _ = build(name, 28, {})
    images = torch.randn(BATCH, 1, 28, 28)
    with torch.no_grad():
        logits, features = logits_and_features(model.eval(), images)
        assert torch.equal(logits, model(images))
        assert torch.equal(model.head(features), logits)
    assert features.shape == (BATCH, feature_width(model)) == (BATCH, {"mlp": 512, "cnn": 128}[name])
    assert head_parameters(model) == [model.head.weight, model.head.bias]


def test_features_and_logits_are_float32_under_autocast() -> None:
    model, _ = build("resnetv2_18", 32, {})
    images = torch.randn(BATCH, 1, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, features = logits_and_features(model.eval(), images)
        low = model(images)
    assert low.dtype == torch.bfloat16 and logits.dtype == features.dtype == torch.float32
    assert torch.equal(logits, low.float())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen3_vit_88m_enc", {"depth": 1}, "model.name: qwen3_vit_88m_enc needs `head`, an nn.Linear"),
        ("gemma4_vit_167m", {"depth": 1}, "model.name: gemma4_vit_167m cannot be trained: it begins with values that "),
        ("dla46x_c", {"global_pool": ""}, "model.name: dla46x_c cannot be trained: it returns shape (1, 10, 1, 1)"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_before_training(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(name, 32, options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_head_without_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a later family of timm whose forward_head does not stop before the classifier, or differs from forward."""
    dla = type(timm.create_model("dla46x_c"))
    forward_head = dla.forward_head
    monkeypatch.setattr(dla, "forward_head", lambda self, x, pre_logits=False: forward_head(self, x))
    with pytest.raises(
        ValueError, match=r"model.name: dla46x_c cannot be used: its features do not lead to its logits"
    ):
        build("dla46x_c", 32, {})
    monkeypatch.setattr(dla, "forward_head", lambda self, x, pre_logits=False: 1 / 0)
    monkeypatch.setattr(dla, "forward", lambda self, x: forward_head(self, self.forward_features(x)))
    with pytest.raises(ValueError, match=r"model.name: dla46x_c cannot be used: its classifier .*division by zero"):
        build("dla46x_c", 32, {})


def test_a_model_of_colour_alone_reads_grey_images_three_times() -> None:
    model, normalization = build("csatv2", 64, {})
    assert normalization == Normalization((0.5,) * 3, (0.25,) * 3)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    cfg = ModelConfig(name="csatv2", pretrained=True)  # no convolution reads the image, so there is nothing to fold
    model, normalization = build_model(cfg, num_classes=10, mean=(0.5,), std=(0.25,), image_size=64, load_weights=False)
    assert len(normalization.mean) == 3 and model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_tied_weights_are_saved_each_by_its_name(tmp_path: Path) -> None:
    tied = torch.arange(6.0).view(2, 3)
    save_file(apart({"a": tied, "b": tied, "row": tied[1]}), tmp_path / "tied")
    found = read_tensors(tmp_path / "tied")
    assert torch.equal(found["a"], tied) and torch.equal(found["b"], tied)
    assert found["row"].tolist() == [3.0, 4.0, 5.0]
