"""A model of one's own: a line in the registry, a layer named `head`; what it lacks is one line, before training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmnist.config.schema import ModelConfig
from fmnist.models import REGISTRY, build_model
from fmnist.models.head import feature_width, head_parameters, logits_and_features


class Tiny(nn.Module):
    def __init__(self, num_classes: int, width: int = 7, name: str = "head") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        setattr(self, name, nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return list(self.children())[-1](self.body(images))


class Unused(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).repeat(1, 2)[:, :10]


def build(model: type[nn.Module], monkeypatch: pytest.MonkeyPatch, **options: Any) -> nn.Module:
    monkeypatch.setitem(REGISTRY, "tiny", model)
    cfg = ModelConfig(name="tiny", options=options)
    return build_model(cfg, num_classes=10, mean=(0.286,), std=(0.353,), image_size=28)[0]


def test_a_layer_named_head_is_all_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Tiny, monkeypatch, width=5).eval()
    images = torch.rand(3, 1, 28, 28)
    logits, features = logits_and_features(model, images)
    assert torch.equal(logits, model(images)) and torch.equal(features, model.body(images))
    assert feature_width(model) == 5
    assert [parameter.shape for parameter in head_parameters(model)] == [(10, 5), (10,)]
    assert not model.head._forward_pre_hooks


def test_what_it_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="model.name: tiny needs `head`, an nn.Linear that makes the logits, or timm's "
    ):
        build(Tiny, monkeypatch, name="classifier")
    with pytest.raises(ValueError, match="model.name: tiny cannot be used: its features do not lead to its logits"):
        build(Unused, monkeypatch)


class Deep(Tiny):
    def __init__(self, num_classes: int, drop_path_rate: float) -> None:
        super().__init__(num_classes)
        self.drop_path_rate = drop_path_rate


@pytest.mark.parametrize(("option", "what"), [("drop_rate", "dropout"), ("drop_path_rate", "stochastic depth")])
def test_a_rate_that_it_does_not_take_is_refused_at_a_start_and_said_of_an_old_run(
    option: str, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(REGISTRY, "tiny", Tiny)
    cfg = ModelConfig(name="tiny", **{option: 0.3})
    line = f"model.{option} 0.3 has no effect: tiny has no {what}"
    data: dict[str, Any] = {"num_classes": 10, "mean": (0.286,), "std": (0.353,), "image_size": 28}
    with pytest.raises(ValueError, match=f"^{line}; valid: 0$"):
        build_model(cfg, **data)
    assert not caplog.records
    model, _ = build_model(cfg, **data, load_weights=False)  # as evaluation and a resumed run build it
    assert isinstance(model, Tiny) and caplog.messages == [line]


def test_a_rate_that_it_takes_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "deep", Deep)
    cfg = ModelConfig(name="deep", drop_path_rate=0.3)
    model, _ = build_model(cfg, num_classes=10, mean=(0.286,), std=(0.353,), image_size=28)
    assert isinstance(model, Deep) and model.drop_path_rate == 0.3
