"""Matrix products in place of convolutions: the same numbers and gradients, put in and taken out, chosen and said."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_golden
import timm
import torch
from forks import Forks, difference
from small import untrained
from test_exactness import PLAIN as FIRST
from test_exactness import make_config
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from fmnist.config.schema import AugmentConfig, Config, ModelConfig
from fmnist.data.fashion_mnist import INFO
from fmnist.models.depthwise import axes, depthwise_matmul
from fmnist.models.fast_layers import PLAIN, depthwise_without_effect, use_convolutions, use_fast_layers
from fmnist.models.flops import flops_per_image
from fmnist.models.matmul_layers import MatmulConv2d, MatmulConv2dSame, describe_matmul, takes_matmul
from fmnist.models.triton_layers import TritonConv2d
from fmnist.network import build_network
from fmnist.trained import open_trained

CPU = torch.device("cpu")
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2}  # of a ConvNeXt
CONVS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {  # options of a convolution of six channels, and its map
    "7x7": ({"kernel_size": 7, "padding": 3}, (8, 8)),
    "7x7 on one pixel": ({"kernel_size": 7, "padding": 3}, (1, 1)),
    "7x7 on a strip": ({"kernel_size": 7, "padding": 3}, (2, 7)),
    "7x7 unpadded": ({"kernel_size": 7}, (8, 7)),
    "5x5 stride 2": ({"kernel_size": 5, "padding": 2, "stride": 2}, (7, 8)),
    "3x3 stride 3": ({"kernel_size": 3, "padding": 1, "stride": 3}, (8, 6)),
    "two strides": ({"kernel_size": 3, "padding": (0, 1), "stride": (1, 2)}, (5, 5)),
    "1x11": ({"kernel_size": (1, 11), "padding": (0, 5)}, (4, 6)),
    "11x1": ({"kernel_size": (11, 1), "padding": (5, 0)}, (6, 4)),
    "even kernel": ({"kernel_size": (4, 2), "padding": (2, 1)}, (5, 6)),
    "padded beyond the kernel": ({"kernel_size": 3, "padding": 4}, (3, 3)),
    "same": ({"kernel_size": (4, 5), "padding": "same"}, (5, 6)),
    "valid": ({"kernel_size": 3, "padding": "valid"}, (4, 6)),
    "dilated": ({"kernel_size": 3, "padding": 2, "dilation": 2}, (6, 5)),
    "dilated same": ({"kernel_size": (4, 3), "padding": "same", "dilation": 3}, (7, 5)),
    "1x1": ({"kernel_size": 1}, (3, 2)),
}


def formats(images: Tensor) -> dict[str, Tensor]:
    wide = torch.cat((images, images), dim=1)
    return {
        "contiguous": images,
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "half of the channels": wide[:, : images.shape[1]],
        "the same, channels_last": wide.contiguous(memory_format=torch.channels_last)[:, : images.shape[1]],
        "turned": images.transpose(2, 3).contiguous().transpose(2, 3),
    }


def gradients(function: Any, images: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    images = images.detach().requires_grad_()
    convolved = function(images)
    weights = torch.linspace(-1, 1, convolved.numel(), dtype=images.dtype).view(convolved.shape)
    return [convolved, *torch.autograd.grad((convolved * weights).sum(), [images, *conv.parameters()])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_the_product_is_the_convolution_with_its_gradients(name: str, bias: bool) -> None:
    options, size = CONVS[name]
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, groups=6, bias=bias, **options).double()
    lies = axes(conv, size)
    for kind, images in formats(torch.randn(3, 6, *size, dtype=torch.float64)).items():
        found = gradients(lambda x: depthwise_matmul(x, conv.weight, conv.bias, *lies), images, conv)
        wanted = gradients(conv, images, conv)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=kind)
        if kind in ("contiguous", "channels_last") and found[0][0, 0].numel() > 1:
            assert found[0].stride() == wanted[0].stride(), kind


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (7, 8)])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (5, 1, 1), (4, 2, 1), (3, 1, 2)])
def test_tensorflows_padding(size: tuple[int, int], kernel: int, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    conv = Conv2dSame(6, 6, kernel, stride, dilation=dilation, groups=6).double()
    for images in formats(torch.randn(2, 6, *size, dtype=torch.float64)).values():
        found = gradients(lambda x: depthwise_matmul(x, conv.weight, conv.bias, *axes(conv, size)), images, conv)
        for one, other in zip(found, gradients(conv, images, conv), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, 2, 1, groups=2).double()
    images = torch.randn(2, 2, 3, 4, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    bias = conv.bias
    assert bias is not None

    def product(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_matmul(images, weight, bias, *axes(conv, (3, 4)))

    assert torch.autograd.gradcheck(product, (images, conv.weight, bias))
    assert torch.autograd.gradgradcheck(product, (images, conv.weight, bias))


def test_an_empty_batch_and_a_single_image() -> None:
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    for batch in (0, 1):
        images = torch.randn(batch, 4, 3, 3)
        for kind in (torch.contiguous_format, torch.channels_last):
            laid = images.contiguous(memory_format=kind)
            found = depthwise_matmul(laid, conv.weight, conv.bias, *axes(conv, (3, 3)))
            torch.testing.assert_close(found, conv(images))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_computes_in_bf16_as_it_does_for_a_convolution(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    images = torch.randn(8, 4, 6, 6).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda x: depthwise_matmul(x, conv.weight, conv.bias, *axes(conv, (6, 6))), images, conv)
        wanted = gradients(conv, images, conv)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 0.01 * other.norm()
    assert found[0].dtype == torch.bfloat16


def model_of(name: str, size: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, in_chans=1, num_classes=10, **options)


SAID = "{} depthwise convolutions (maps of up to {} x {}), {} pointwise or patch convolutions"
MODELS: dict[str, tuple[str, int, dict[str, Any], str]] = {  # name, pixels, options, and what is said of it
    # 32 px: maps of 8, 4, 2 and 1 after the stem's 2 x 2 and each stage's; two 1 x 1 in each block, a patch before each
    "convnext": ("convnext_atto", 32, SMALL, SAID.format(4, 8, 8, 12)),
    "conv_mlp false": ("convnext_atto", 32, SMALL | {"conv_mlp": False}, SAID.format(4, 8, 8, 4)),
    "odd maps": ("convnext_atto", 37, SMALL, SAID.format(3, 4, 4, 12)),  # of 9, 4, 2 and 1
    "convnext v2": ("convnextv2_atto", 32, SMALL, SAID.format(4, 8, 8, 12)),
    "lite0": ("tf_efficientnet_lite0", 64, {}, "9 depthwise convolutions (maps of up to 8 x 8)"),
    "mobilenet": ("mobilenetv3_small_050", 32, {}, "8 depthwise convolutions (maps of up to 4 x 4)"),  # its 5 x 5
    "inception": ("inception_next_atto", 64, {}, "6 depthwise convolutions (maps of up to 2 x 2)"),  # its last stage
    "mixnet": ("mixnet_s", 32, {}, "depthwise convolutions (maps of up to 8 x 8)"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", ["convnext", "conv_mlp false", "odd maps", "convnext v2", "mobilenet"])
def test_any_timm_model_trains_to_the_same_gradients(case: str, memory_format: torch.memory_format) -> None:
    name, size, options, _ = MODELS[case]
    plain = model_of(name, size, **options).double().to(memory_format=memory_format)
    product = copy.deepcopy(plain)
    use_fast_layers(product, "auto", CPU)
    images = torch.randn(3, 1, size, size, dtype=torch.float64)
    for model in (plain, product):
        torch.manual_seed(1)
        model(images).logsumexp(-1).sum().backward()
    for (key, one), other in zip(product.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert (one.grad - other.grad).norm() <= 1e-8 * other.grad.norm() + 1e-10, key
    for (key, one), other in zip(product.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.thorough if case == "mixnet" else ()) for case in MODELS]
)
def test_what_the_start_line_says(case: str) -> None:
    name, size, options, said = MODELS[case]
    model = model_of(name, size, **options)
    assert describe_matmul(model, 1, [size]) == ""
    use_fast_layers(model, "auto", CPU)
    before = copy.deepcopy(model.state_dict())
    found = describe_matmul(model, 1, [size])
    assert found.startswith("as matrix products: ") and found.endswith(said)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("case", ["convnext", "convnext v2", "lite0"])
def test_put_in_and_taken_out(case: str) -> None:
    name, size, options, _ = MODELS[case]
    model = model_of(name, size, **options)
    kinds = [type(module) for module in model.modules()]
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    keys, attributes = list(model.state_dict()), [set(vars(module)) for module in modules]
    flops = flops_per_image(model, 1, size)
    for _ in range(2):  # twice is once
        use_fast_layers(model, "auto", CPU)
    assert {type(module) for module in model.modules()} & {MatmulConv2d, MatmulConv2dSame}
    assert list(model.state_dict()) == keys and list(model.modules()) == modules
    assert all(parameters[key] is value for key, value in model.named_parameters())
    assert flops_per_image(model, 1, size) == flops
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        use_convolutions(other)
        assert [type(module) for module in other.modules()] == kinds
    use_convolutions(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in modules] == attributes
    assert all(parameters[key] is value for key, value in model.named_parameters())


def test_evaluation_keeps_the_convolutions_and_their_bits() -> None:
    model = model_of("convnext_atto", 32, **SMALL, ls_init_value=1.0)
    images = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        wanted = model.eval()(images)
        use_fast_layers(model, "matmul", CPU)
        assert torch.equal(model(images), wanted)
        assert not torch.equal(model.train()(images), wanted)  # other arithmetic, and so other last bits
    program = torch.export.export(model.eval(), (images,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in called) and not any("bmm" in name for name in called)


def test_what_is_not_a_plain_depthwise_convolution_stays() -> None:
    class Standardised(nn.Conv2d):
        """Makes its kernel on the fly."""

    others = nn.Sequential(
        Standardised(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 3, groups=4),  # two kernels a channel
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
        nn.Conv2d(1, 1, 3),
        nn.ConvTranspose2d(4, 4, 3, groups=4),
        nn.Conv1d(4, 4, 3, groups=4),
    )
    kinds = [type(module) for module in others]
    use_fast_layers(others, "matmul", CPU)
    assert [type(module) for module in others] == kinds


DECISIONS = [  # taps, map, and whether auto takes the product for contiguous images, and for channels_last
    (7, (8, 8), True, True),
    (7, (4, 4), True, True),
    (7, (8, 9), False, False),
    (5, (8, 8), True, False),  # 64 > 1.5 * 25
    (5, (6, 6), True, True),
    (3, (3, 3), False, False),
    (3, (2, 2), True, True),
    (3, (1, 4), True, True),
    ((1, 11), (8, 8), True, False),
    ((1, 11), (4, 4), True, True),
]


@pytest.mark.parametrize(("kernel", "size", "contiguous", "last"), DECISIONS)
def test_the_decision(kernel: Any, size: tuple[int, int], contiguous: bool, last: bool) -> None:
    conv = nn.Conv2d(4, 4, kernel, padding="same", groups=4)
    images = torch.randn(2, 4, *size)
    use_fast_layers(conv, "auto", CPU)
    assert isinstance(conv, MatmulConv2d)
    for kind, expected in ((torch.contiguous_format, contiguous), (torch.channels_last, last)):
        one, many = (torch.cat([images] * n).contiguous(memory_format=kind) for n in (1, 16))
        assert takes_matmul(conv, one) == takes_matmul(conv, many) == expected  # whatever the batch
    use_fast_layers(conv, "matmul", CPU)
    assert takes_matmul(conv, images)


def test_forced_products_stay_small_and_impossible_maps_are_the_convolutions_to_refuse() -> None:
    conv = nn.Conv2d(4, 4, 7, groups=4)
    use_fast_layers(conv, "matmul", CPU)
    assert isinstance(conv, MatmulConv2d)
    assert takes_matmul(conv, torch.zeros(1, 4, 16, 16)) and not takes_matmul(conv, torch.zeros(1, 4, 16, 17))
    assert conv(torch.zeros(4, 8, 8)).shape == (4, 2, 2)  # an image without a batch
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        conv(torch.zeros(1, 4, 5, 5))


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_auto_is_the_convolution_on_other_devices_until_measured(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 7, padding=3, groups=4))
    use_fast_layers(model, "auto", torch.device(device))
    assert type(model[0]) is nn.Conv2d
    use_fast_layers(model, "matmul", torch.device(device))
    assert type(model[0]) is MatmulConv2d
    use_fast_layers(model, "conv", CPU)
    assert type(model[0]) is nn.Conv2d


def test_a_setting_without_effect_is_said() -> None:
    def said(model: nn.Module, choice: Any, size: int = 32) -> str:
        use_fast_layers(model, choice, CPU)
        return depthwise_without_effect(model, choice, 1, [size])

    convnext, without = model_of("convnext_atto", 32, **SMALL), model_of("resnet10t", 32)
    assert [said(convnext, choice) for choice in ("auto", "conv", "matmul")] == ["", "", ""]
    assert said(without, "auto") == ""
    assert said(without, "conv") == "conv has no effect: the model has no plain depthwise convolution"
    assert said(without, "matmul") == "matmul has no effect: the model has no plain depthwise convolution"
    wide = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4))
    assert said(wide, "matmul", 17) == "matmul has no effect: no depthwise convolution has a map of at most 256 pixels"


def test_the_network_is_built_with_what_the_option_says() -> None:
    for choice, kinds in (("auto", set(PLAIN) - {MatmulConv2dSame, TritonConv2d}), ("conv", set())):
        network = ModelConfig(name="convnext_atto", options=SMALL, depthwise=choice)  # type: ignore[arg-type]
        model, _ = build_network(Config(model=network, augment=AugmentConfig(size=32)), INFO, CPU, load_weights=False)
        assert {type(module) for module in model.modules()} & set(PLAIN) == kinds


@pytest.mark.parametrize("threads", [1, 2])
def test_the_gradient_has_the_same_bits_each_time(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        conv = nn.Conv2d(48, 48, 7, padding=3, groups=48)
        for images in list(formats(torch.randn(64, 48, 8, 8)).values())[:2]:
            lies = axes(conv, (8, 8))
            first, *others = (
                gradients(lambda x: depthwise_matmul(x, conv.weight, conv.bias, *lies), images, conv)  # noqa: B023
                for _ in range(4)
            )
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_twenty_steps_are_those_of_the_convolutions_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = json.loads((test_golden.FOLDER / "convnext.json").read_text())["found"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        augment, model = test_golden.MODELS["convnext"]
        monkeypatch.setitem(test_golden.MODELS, "convnext", (augment, replace(model, depthwise="auto")))
        found = test_golden.train_and_record("convnext")
    finally:
        torch.set_num_threads(threads)
    assert found["loss"] != wanted["loss"]  # so it was the other arithmetic
    for key in ("loss", "val_loss"):
        assert found[key] == pytest.approx(wanted[key], rel=0, abs=1e-4)


def whole_run(**model: Any) -> dict[str, Any]:
    """The config of a run of 24 steps that trains with products of every kind, fp32, moving average and drop path."""
    config = make_config(FIRST | {"model": "convnext", "ema": True, "drop": True, "saved_every": 1})
    options = config["model"]["options"] | {"conv_mlp": True}
    return config | {"model": config["model"] | {"options": options} | model}


@pytest.mark.thorough
def test_exact_and_resumed_runs_keep_their_bits(forks: Forks, tmp_path: Path) -> None:
    config = whole_run() | {"exact": 4}
    forks.start(tmp_path / "whole", config)
    forks.start(tmp_path / "convolutions", whole_run(depthwise="conv") | {"exact": 4})
    assert "model.safetensors" in difference(tmp_path / "whole", tmp_path / "convolutions")  # it was the products
    forks.start(tmp_path / "two", config, 2)
    assert difference(tmp_path / "two", tmp_path / "whole") == []
    forks.start(tmp_path / "moved", config, 2, strike=[9, "update"])
    forks.start(tmp_path / "moved", config, 1, strike=[17, "saved"])
    forks.start(tmp_path / "moved", config, 4)
    assert difference(tmp_path / "moved", tmp_path / "whole") == []


def test_a_trained_run_answers_alike_whatever_the_option(tmp_path: Path) -> None:
    run = untrained(tmp_path / "run", ModelConfig(name="convnext_atto", options=SMALL), 32)
    images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    answers = [open_trained(run, "cpu", depthwise=choice)(images) for choice in ("auto", "conv", "matmul")]
    assert all(torch.equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))
    assert answers[0][0].shape == (3, 10)
