"""FLOPs by hand, and the memory of what stays on the device."""

import pytest
import timm
import torch
from torch import nn

from fmnist.models.flops import flops_per_image
from fmnist.models.mlp import Mlp
from fmnist.runtime.muon import Muon
from fmnist.training.plan import memory_bytes


def test_a_linear_layer_by_hand() -> None:
    # 784 x 512 + 512 x 512 + 512 x 10 = 668,672 multiply-adds, two operations each.
    forward, both = flops_per_image(Mlp(10, image_size=28), 1, 28)
    assert forward == 2 * 668_672
    # Backward: both gradients of each product, but none towards the image: 2 x 668,672 - 784 x 512 multiply-adds more.
    assert both == 2 * (668_672 + 2 * 668_672 - 784 * 512)


def test_a_depthwise_convolution_is_not_counted_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.Flatten(), nn.Linear(1600, 10)
    )
    forward, both = flops_per_image(model, 1, 10)
    point, depthwise, head = 100 * 16, 100 * 16 * 49, 1600 * 10  # multiply-adds
    assert forward == 2 * (point + depthwise + head)
    assert both == 2 * (2 * point + 3 * depthwise + 3 * head)  # no gradient towards the image
    assert all(p.grad is None for p in model.parameters())


def test_convnext_tiny_at_224_is_what_is_published() -> None:
    # timm's table: 4.47 G multiply-adds with 1000 classes and three channels.
    forward, both = flops_per_image(timm.create_model("convnext_tiny"), 3, 224)
    assert forward / 2e9 == pytest.approx(4.47, abs=0.03)
    assert both / 1e9 == pytest.approx(26.7, abs=0.2)


def test_memory_is_counted_in_bytes() -> None:
    model = nn.Linear(10, 10)  # 110 parameters of 4 bytes
    memory = memory_bytes(model, 100 * (784 + 8), torch.optim.AdamW(model.parameters()), ema=True)
    assert memory == {"data": 100 * 792, "weights": 440, "gradients": 440, "optimizer": 880, "ema": 440}
    sgd, plain = (torch.optim.SGD(model.parameters(), momentum=momentum) for momentum in (0.9, 0.0))
    assert memory_bytes(model, 100 * (784 + 8), sgd, ema=False)["optimizer"] == 440
    assert memory_bytes(model, 100 * (784 + 8), plain, ema=False)["optimizer"] == 0
    groups = [{"params": [model.weight], "muon": True}, {"params": [model.bias], "muon": False}]
    muon = Muon(groups, lr=0.1, betas=(0.9, 0.999))
    assert memory_bytes(model, 100 * (784 + 8), muon, ema=False)["optimizer"] == 4 * (100 + 2 * 10)
