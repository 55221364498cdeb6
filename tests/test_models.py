"""Models: counts, the exact one-channel stem, strict and safe loading, errors in one line."""

import copy
import hashlib
import logging
import os
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmnist.config.schema import ModelConfig
from fmnist.data import fashion_mnist
from fmnist.models import Normalization, build_model, model_names, weights
from fmnist.models.cnn import CellPool
from fmnist.models.stem import to_one_channel

LITE0 = "tf_efficientnet_lite0.safetensors"
LITE0_SHA256 = "2b4a5f7e9a1870e2c41efd811c5b04f7e5843b32900a338e3f181204a324f9c6"
pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str, size: int = 32, **settings):
    load_weights = settings.pop("load_weights", True)
    image_sizes = settings.pop("image_sizes", ())
    cfg = ModelConfig(name=name, **settings)
    data = {"num_classes": 10, "mean": (0.25,), "std": (0.5,)}
    return build_model(cfg, **data, image_size=size, image_sizes=image_sizes, load_weights=load_weights)


def error_of(name: str, size: int = 32, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        build(name, size, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Eight test images in [0, 1], float32 [8, 1, 28, 28]."""
    return fashion_mnist.load("test")[0][:8, None].float() / 255


def normalized(images: Tensor, size: int, normalization: Normalization) -> Tensor:
    """Do what the data path does: resize, replicate to the channels the model reads, normalise."""
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.expand(-1, len(normalization.mean), -1, -1)
    mean, std = (torch.tensor(v, dtype=images.dtype) for v in (normalization.mean, normalization.std))
    return (images - mean[:, None, None]) / std[:, None, None]


def realistic(name: str, size: int, **kwargs) -> nn.Module:
    """A 1000-class RGB timm model whose norms, biases and layer scales are all at work."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000, **kwargs)
    for key, p in model.named_parameters():
        if key.endswith("gamma"):  # layer scale: 1e-6 at birth, of the order 0.1 in trained networks
            nn.init.uniform_(p, 0.05, 0.3)
        elif p.ndim == 1:
            nn.init.normal_(p, 1.0 if key.endswith("weight") else 0.0, 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over the forwards below
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, size, size))
    return model.eval()


def features_and_logits(model: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        return torch.cat([features.flatten(1), head.to(images.dtype)(features).flatten(1)], 1)


def max_differences(model, normalization, rgb, images, size) -> tuple[float, float]:
    """Compare with the RGB model on normalised replicated images, and that one with itself in float64."""
    cfg = rgb.pretrained_cfg
    head = copy.deepcopy(model.get_classifier())
    three = normalized(images, size, Normalization(tuple(cfg["mean"]), tuple(cfg["std"])))
    wanted = features_and_logits(rgb, head, three)
    given = features_and_logits(model, head, normalized(images, size, normalization))
    assert wanted.std() > 0.01  # the comparison is not one of zeros
    precise = features_and_logits(copy.deepcopy(rgb).double(), head, three.double())
    head.to(images.dtype)
    return (given - wanted).abs().max().item(), (wanted - precise).abs().max().item()


def assert_same_numbers(model, normalization, rgb, images, size) -> None:
    name = rgb.pretrained_cfg["architecture"]
    difference, rounding = max_differences(model, normalization, rgb, images, size)
    # BatchNorm networks amplify rounding: there even the RGB model is further than 1e-5 from float64.
    assert difference < max(1e-5, 2 * rounding)

    # In float64 no rounding hides a wrong fold.
    size = size if name.startswith("vit") else 64  # float64 is slow
    double = copy.deepcopy(rgb).double()
    normalization = to_one_channel(double, name, [size])
    exact, _ = max_differences(double, normalization, copy.deepcopy(rgb).double(), images[:2].double(), size)
    print(f"{name}: {difference:.1e} (the RGB model's own rounding {rounding:.1e}), in float64 {exact:.1e}")
    assert exact < 1e-10


# --- our own models


def test_mlp_parameters():
    # 28*28*512 + 512 = 401,920; 512*512 + 512 = 262,656; 512*10 + 10 = 5,130
    assert count(build("mlp", 28)[0]) == 401_920 + 262_656 + 5_130 == 669_706


def test_cnn_parameters():
    # Convolutions 9 * (1*32 + 32*64 + 64*64 + 64*128 + 128*128) = 9 * 30,752 = 276,768;
    # BatchNorm 2 * (32 + 64 + 64 + 128 + 128) = 832; head 128*10 + 10 = 1,290
    assert count(build("cnn", 28)[0]) == 276_768 + 832 + 1_290 == 278_890


@pytest.mark.parametrize(
    ("options", "parameters", "maps"),
    [
        # 9 * (1*32 + 32*64 + 64*64 + 64*128 + 128*128) + 2 * 416 + 1,290, as above: only the place of the pool differs.
        ({"early_pool": True}, 278_890, [28, 14, 14, 7, 7]),
        # The stem has 16 * 32 instead of 9 * 32 weights.
        ({"stem_stride": 2}, 278_890 + 7 * 32, [14, 14, 14, 7, 7]),
        # 16*32 + 9 * (32*64 + 64*128 + 128*128) = 240,128; BatchNorm 2 * 352; the head.
        ({"stem_stride": 2, "early_pool": True, "depths": [1, 2]}, 240_128 + 704 + 1_290, [14, 14, 7, 7]),
        # The head reads 3 x 3 cells of 128 values: 1,152 * 10 + 10.
        (
            {"stem_stride": 2, "early_pool": True, "depths": [1, 2], "pool_size": 3},
            240_128 + 704 + 11_530,
            [14, 14, 7, 7],
        ),
        # 9 * (8 + 8*16 + 16*24 + 24*24 + 24*24 + 24*32) = 21,960; BatchNorm 2 * 128; head 32*10 + 10.
        ({"widths": [8, 16, 24, 32], "depths": [1, 3, 1]}, 21_960 + 256 + 330, [28, 14, 7, 7, 7, 3]),
    ],
)
def test_cnn_options_by_parameters_and_sizes_of_its_maps(options, parameters, maps):
    model, _ = build("cnn", 28, options=options)
    assert count(model) == parameters
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert sizes == maps


@pytest.mark.parametrize("options", [{"depths": [2]}, {"depths": [2, 0]}, {"stem_stride": 3}, {"pool_size": 0}])
def test_cnn_options_that_do_not_belong_together_are_one_line(options):
    assert "valid: a width for the stem and for each stage" in error_of("cnn", 28, options=options)


@pytest.mark.parametrize(
    ("size", "cells", "bounds"),
    [
        (7, 3, [(0, 3), (2, 5), (4, 7)]),  # the CNN's maps at 28 px
        (5, 3, [(0, 3), (1, 4), (2, 5)]),  # at 20 px
        (14, 3, [(0, 6), (4, 10), (8, 14)]),
        (6, 3, [(0, 2), (2, 4), (4, 6)]),
        (3, 3, [(0, 1), (1, 2), (2, 3)]),
        (9, 1, [(0, 9)]),
    ],
)
def test_cells_are_means_equally_far_apart_and_leave_out_no_place(size, cells, bounds):
    maps = torch.randn(2, 5, size, size, dtype=torch.float64, requires_grad=True)
    means = torch.stack([torch.stack([maps[..., a:b, c:d].mean((2, 3)) for c, d in bounds], -1) for a, b in bounds], -2)
    pooled = CellPool(cells)(maps)
    assert pooled.shape == (2, 5, cells, cells)
    torch.testing.assert_close(pooled, means, rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(CellPool(cells), maps)
    pooled.sum().backward()
    assert (maps.grad > 0).all()
    oblong = torch.randn(1, 1, 2 * size, size)
    assert CellPool(cells)(oblong).shape == (1, 1, cells, cells)


def test_images_too_small_for_the_cells_are_one_line():
    options = {"pool_size": 3, "stem_stride": 2, "early_pool": True}
    assert "pool_size is 3, but the last maps are 2 x 2: train on larger images" in error_of("cnn", 8, options=options)
    build("cnn", 12, options=options)


def test_hybrid_parameters_and_places():
    model, _ = build("hybrid", 28)
    # Convolutions 16*32 + 9 * (32*64 + 64*128) = 92,672; BatchNorm 2 * (32 + 64 + 128) = 448. A block of width D = 128
    # has 4 D^2 + 4 D in its attention, 2 * 2 D^2 + 3 D in its perceptron, 4 D in its norms: 132,480. Norm 256, head
    # 1,290.
    assert count(model) == 92_672 + 448 + 3 * 132_480 + 256 + 1_290
    shapes = []
    model.blocks.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape))
    model(torch.rand(2, 1, 28, 28))
    assert shapes == [(2, 49, 128)]
    assert "hybrid cannot be built" in error_of("hybrid", 28, options={"heads": 3})  # 128 is no multiple of 3


def test_the_hybrid_tells_places_apart_without_a_position_embedding():
    torch.manual_seed(0)
    model = build("hybrid", 28)[0].eval()
    image = torch.zeros(1, 1, 28, 28)
    image[..., :8, :8] = torch.rand(8, 8)
    corner, middle = model(image), model(image.roll((8, 8), (-2, -1)))
    assert (corner - middle).abs().max() > 1e-3


def test_wide_resnet_parameters_and_places():
    model, _ = build("wide_resnet", 28)  # WRN-16-8, 11.0 M in the paper's table, for colour
    # A block from a to b channels: 9 (a + b) b in its convolutions, 2 (a + b) in its norms, a b in a shortcut.
    wide = (16, 128, 128), (128, 256, 256), (256, 512, 512)
    blocks = sum(9 * (a + b) * b + 2 * (a + b) + a * b + 18 * c * c + 4 * c for a, b, c in wide)
    assert count(model) == 9 * 16 + blocks + 2 * 512 + 512 * 10 + 10 == 10_961_082
    shapes = []
    model.norm.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape))
    model(torch.rand(2, 1, 28, 28))
    assert shapes == [(2, 512, 7, 7)]
    assert count(build("wide_resnet", 28, options={"depth": 10, "width": 1})[0]) < 100_000
    assert "valid: depth 10, 16, 22, 28" in error_of("wide_resnet", 28, options={"depth": 18})


def test_a_block_of_the_wide_resnet_adds_to_what_came():
    block = build("wide_resnet", 28, options={"width": 1})[0].blocks[1]
    maps = torch.randn(2, 16, 7, 7)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(maps), maps)


@pytest.mark.parametrize("name", ["mlp", "cnn", "hybrid", "wide_resnet"])
@pytest.mark.parametrize("size", [8, 28, 33])
def test_own_models_take_any_size(name, size):
    model, normalization = build(name, size, drop_rate=0.1)
    assert model(torch.rand(2, 1, size, size)).shape == (2, 10)
    assert normalization == Normalization((0.25,), (0.5,))
    assert model.training and all(m.training for m in model.modules())


def test_options_reach_the_model():
    assert build("mlp", 28, options={"width": 16})[0].head.in_features == 16
    assert build("cnn", 28, options={"widths": [8, 16]})[0].head.in_features == 16


# --- timm from scratch


@pytest.mark.parametrize(("name", "size"), [("convnext_atto", 32), ("vit_tiny_patch16_224", 32), ("resnet18", 32)])
def test_timm_from_scratch_reads_one_channel(name, size):
    model, normalization = build(name, size, drop_rate=0.1, drop_path_rate=0.1)
    assert model(torch.rand(2, 1, size, size)).shape == (2, 10)
    assert normalization == Normalization((0.25,), (0.5,))


def test_small_convnext():
    model, _ = build("convnext_atto", options={"patch_size": 2, "depths": [1, 1, 2, 1], "dims": [24, 48, 96, 192]})
    assert count(model) < 1_000_000


def test_vit_takes_several_sizes():
    model, _ = build("vit_tiny_patch16_224", 64, image_sizes=(32, 48))
    for size in (32, 48, 64):
        assert model(torch.rand(1, 1, size, size)).shape == (1, 10)


def test_building_leaves_the_random_state_to_the_weights():
    # The check of the image size draws nothing: the stream goes on where the constructor left it.
    torch.manual_seed(0)
    build("convnext_atto")
    ours = torch.rand(1)
    torch.manual_seed(0)
    timm.create_model("convnext_atto", in_chans=1, num_classes=10)
    assert torch.equal(ours, torch.rand(1))


# --- pretrained: the one-channel stem

RAW = Normalization((0.0,), (1.0,))
HALF = Normalization((0.5,), (0.5,))
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FAMILIES = [
    ("convnext_tiny", 224, {}, RAW),
    ("convnext_atto", 64, {"conv_bias": False}, RAW),  # the fold must create the stem's bias
    ("vit_tiny_patch16_224", 224, {}, RAW),
    ("tf_efficientnet_lite0", 64, {}, HALF),
    ("resnet18", 64, {}, IMAGENET),  # padding and unequal statistics: three channels stay
]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "size", "options", "expected"), FAMILIES)
def test_folded_model_equals_the_rgb_model(name, size, options, expected, images, tmp_path, caplog):
    rgb = realistic(name, size, **options)
    safetensors.torch.save_file(rgb.state_dict(), tmp_path / "rgb.safetensors")
    with caplog.at_level(logging.INFO, "fmnist"):
        model, normalization = build(name, size, weights=str(tmp_path / "rgb.safetensors"), options=options)
    assert normalization == expected
    assert ("keeps three channels" in caplog.text) == (len(expected.mean) == 3)
    assert_same_numbers(model, normalization, rgb, images, size)

    empty, same = build(name, size, weights="/nowhere.safetensors", options=options, load_weights=False)
    assert same == normalization
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in empty.state_dict().items()} == shapes
    empty.load_state_dict(model.state_dict(), strict=True)


def test_position_embeddings_are_resampled_as_timm_does(images, tmp_path):
    rgb = realistic("vit_tiny_patch16_224", 224)
    safetensors.torch.save_file(rgb.state_dict(), tmp_path / "rgb.safetensors")
    model, normalization = build("vit_tiny_patch16_224", 96, weights=str(tmp_path / "rgb.safetensors"))
    assert model.pos_embed.shape == (1, 1 + 6 * 6, 192)
    overlay = {"state_dict": rgb.state_dict()}
    timms = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=96)
    assert max_differences(model, normalization, timms, images, 96)[0] < 1e-5


def test_padded_patches_keep_three_channels(tmp_path):
    # With dynamic_img_pad the patch embedding pads before its unpadded convolution: not a fold we may do.
    options = {"dynamic_img_pad": True}
    settings = {"pretrained": True, "load_weights": False, "options": options}
    _, folded = build("vit_tiny_patch16_224", 32, image_sizes=(64,), **settings)
    _, kept = build("vit_tiny_patch16_224", 32, image_sizes=(40,), **settings)
    assert folded == RAW and kept == Normalization((0.5,) * 3, (0.5,) * 3)


def test_standardised_kernels_keep_three_channels():
    # StdConv2dSame standardises its kernel in each forward, over the input channels too.
    model, kept = build("vit_tiny_r_s16_p8_224", 64, pretrained=True, load_weights=False)
    assert kept == Normalization((0.5,) * 3, (0.5,) * 3) and model.patch_embed.backbone.conv.weight.shape[1] == 3


def test_names_of_the_authors_repository(images, tmp_path):
    # Facebook's ConvNeXt files: {"model": ...}, other names, 1000 classes under "head.".
    rgb = realistic("convnext_atto", 64)
    renamed = {}
    for key, value in rgb.state_dict().items():
        key = re.sub(r"stages\.(\d)\.blocks", r"stages.\1", key)
        key = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key)
        key = key.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        renamed[key.replace("head.norm", "norm").replace("head.fc", "head")] = value
    torch.save({"model": renamed}, tmp_path / "w.pth")
    model, normalization = build("convnext_atto", 64, weights=str(tmp_path / "w.pth"))
    assert max_differences(model, normalization, rgb, images, 64)[0] < 1e-5


# --- pretrained: real weights


@pytest.fixture(scope="module")
def lite0() -> Path:
    folders = [os.environ.get("FMNIST_WEIGHTS"), Path(__file__).resolve().parents[2] / "shared" / "weights"]
    for folder in filter(None, folders):
        if (Path(folder) / LITE0).is_file():
            return Path(folder) / LITE0
    pytest.skip(f"no {LITE0}: set FMNIST_WEIGHTS to its folder")


def test_real_weights(lite0, images):
    assert hashlib.sha256(lite0.read_bytes()).hexdigest() == LITE0_SHA256
    model, normalization = build("tf_efficientnet_lite0", 64, weights=str(lite0))
    assert normalization == HALF and model.conv_stem.weight.shape == (32, 1, 3, 3)
    rgb = timm.create_model("tf_efficientnet_lite0").eval()
    rgb.load_state_dict(safetensors.torch.load_file(lite0), strict=True)
    assert_same_numbers(model, normalization, rgb, images, 64)


# --- files that are wrong


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return timm.create_model("resnet18").state_dict()


def weights_error(tensors, path: Path) -> str:
    safetensors.torch.save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    message = error_of("resnet18", weights=str(path))
    assert "model.weights" in message and str(path) in message
    return message


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_files_load(key, suffix, tensors, tmp_path):
    torch.save({key: tensors, "epoch": 3} if key else tensors, tmp_path / f"w{suffix}")
    model, _ = build("resnet18", weights=str(tmp_path / f"w{suffix}"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in tensors.items() if not k.startswith("fc."))
    assert model.fc.weight.shape == (10, 512)


def test_head_in_the_file_is_ignored(tensors, tmp_path):
    headless = {key: value for key, value in tensors.items() if not key.startswith("fc.")}
    other = headless | {"fc.weight": torch.rand(7, 512), "fc.bias": torch.rand(7)}
    for content in (headless, other):
        safetensors.torch.save_file(content, tmp_path / "w.safetensors")
        model, _ = build("resnet18", weights=str(tmp_path / "w.safetensors"))
        assert torch.equal(model.layer4[1].conv2.weight, tensors["layer4.1.conv2.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_file(suffix, share, tensors, tmp_path):
    path = tmp_path / f"w{suffix}"
    weights_error({"x": torch.zeros(1)}, path)  # readable, but it does not fit
    safetensors.torch.save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "damaged" in error_of("resnet18", weights=str(path))


def test_tensors_that_do_not_fit(tensors, tmp_path):
    path = tmp_path / "w.safetensors"
    keys = [f"layer4.1.{part}" for part in ("conv1.weight", "conv2.weight", "bn1.weight", "bn2.bias")]
    message = weights_error({k: v for k, v in tensors.items() if k not in keys}, path)
    assert "4 tensors (layer4.1.conv1.weight, layer4.1.bn1.weight, layer4.1.conv2.weight, ...) missing" in message
    message = weights_error(tensors | {"surplus": torch.zeros(1)}, path)
    assert "1 tensors (surplus) unexpected" in message
    message = weights_error(tensors | {"conv1.weight": torch.zeros(64, 3, 5, 5)}, path)
    assert "conv1.weight (64, 3, 5, 5), not (64, 3, 7, 7)" in message
    message = weights_error(tensors | {"bn1.weight": torch.ones(64, dtype=torch.int64)}, path)
    assert "1 tensors (bn1.weight) of another type" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, tensors, tmp_path):
    broken = tensors["bn1.weight"].clone()
    broken[-1] = value
    message = weights_error(tensors | {"bn1.weight": broken}, tmp_path / "w.safetensors")
    assert "1 tensors (bn1.weight) with values that are not finite" in message


def test_weights_of_eight_bits_are_one_line(tensors, tmp_path):
    small = tensors["bn1.weight"].to(torch.float8_e4m3fn)
    message = weights_error(tensors | {"bn1.weight": small}, tmp_path / "w.safetensors")
    assert "1 tensors (bn1.weight) of 8 bits; valid: 16 bits and more" in message


class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_planted_pickle_is_not_executed(legacy, tensors, tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "w.pt"
    torch.save(tensors | {"epoch": Planted(mark)}, path, _use_new_zipfile_serialization=not legacy)
    assert "holds more than tensors" in error_of("resnet18", weights=str(path))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Planted(mark)))  # the plant does work where it is let in
    assert mark.exists()


def test_files_that_are_no_weights(tmp_path):
    assert "model.weights: there is no file" in error_of("resnet18", weights=str(tmp_path / "none.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    assert "is not a state_dict" in error_of("resnet18", weights=str(tmp_path / "list.pt"))


@pytest.mark.parametrize("offline", [True, False])
def test_hub_out_of_reach(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(weights.hub, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(weights.hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights.hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    message = error_of("convnext_atto", pretrained=True)
    assert "model.pretrained" in message and "model.weights PATH" in message
    assert offline == weights.hub.HF_HUB_OFFLINE


# --- settings that are wrong


def test_unknown_names():
    assert "model.name: unknown model 'convnext_tinny'; nearest: convnext_tiny" in error_of("convnext_tinny")
    assert "'cnm'; nearest: cnn" in error_of("cnm")
    assert "model.name: " in error_of("hf-hub:somebody/something")
    assert "model.name: " in error_of("convnext_tiny.no_such_tag")
    assert {"mlp", "cnn", "convnext_tiny"} <= set(model_names())


def test_unknown_options():
    assert "model.options: mlp has no widht; valid: width" in error_of("mlp", options={"widht": 5})
    message = error_of("convnext_atto", options={"dimms": [1]})
    assert "does not take dimms" in message and "depths, dims" in message
    assert "cannot be set here" in error_of("convnext_atto", options={"checkpoint_path": "x.pth"})
    assert "model.options" in error_of("convnext_atto", options={"depths": "many"})
    assert "model.options" in error_of("cnn", options={"widths": "many"})
    message = error_of("caformer_s18", options={"depths": [1, 1, 1, 1]})  # timm sets it itself
    assert "does not take depths; valid: dims" in message
    assert "csatv2 for 64 px" in error_of("csatv2", 64, options={"depths": [1, 1, 1, 1]})


def test_options_of_a_base_class():
    model, _ = build("deit_tiny_distilled_patch16_224", options={"depth": 2})
    assert len(model.blocks) == 2


def test_settings_without_effect():
    assert "model.pretrained: mlp" in error_of("mlp", pretrained=True)
    assert "model.weights: cnn" in error_of("cnn", weights="w.pt")
    assert "model.drop_path_rate 0.1 has no effect: cnn" in error_of("cnn", drop_path_rate=0.1)
    assert "model.drop_path_rate 0.1 has no effect: vgg11" in error_of("vgg11", drop_path_rate=0.1)
    one_block = error_of("test_vit", 160, drop_path_rate=0.1, options={"depth": 1})  # its rates go from 0 to 0
    assert one_block == "model.drop_path_rate 0.1 has no effect: test_vit has no stochastic depth; valid: 0"


def test_sizes_that_a_model_cannot_take():
    assert "augment.size" in error_of("convnext_atto", 16)  # stride 32
    assert "augment.size" in error_of("mlp", 28, image_sizes=(14,))
    assert "several image sizes" in error_of("mixer_s32_224", 224, image_sizes=(192,))
