"""The kernel against the reference in float64: by Triton's interpreter everywhere, on a GPU where there is one."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fmnist.config.schema import AugmentConfig
from fmnist.data.augment import Augment
from fmnist.data.augment_table import LEVEL, augmentation_table, levels_read
from fmnist.data.augment_torch import Plan, augment_reference
from fmnist.data.batches import NUM_UNIFORMS, MicroBatch
from fmnist.data.colour import changes_colours
from fmnist.data.pyramid import build_pyramid
from fmnist.data.split import Split
from fmnist.runtime.hardware import to_device

pytest.importorskip("triton")

OFF = AugmentConfig(flip=0.0)
GEOMETRY = AugmentConfig(flip=0.5, rotation=10, shift=0.1, scale=0.1)
ERASING = replace(GEOMETRY, erase=0.6)
ALL = replace(ERASING, mixup_alpha=0.4, cutmix_alpha=1.0, mix_probability=0.8)
COLOURS = replace(
    ALL,
    flip_vertical=0.5,
    crop=0.2,
    trivial=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.2,
    mix_probability=0.5,
)
HARD = replace(ALL, rotation=180, shift=0.5, scale=1.0)  # most of it outside the image
BAR = 2 / 255
GREY = {"mean": (0.286,), "std": (0.353,)}
COLOUR = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture
def interpreted() -> Iterator[ModuleType]:
    """The kernel's module, its kernels run by Triton's interpreter: which one is decided where they are defined."""
    from fmnist.data import augment_triton as resample

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.reload(resample)
    importlib.reload(resample)


def uniforms(count: int, seed: int = 0) -> Tensor:
    return torch.rand(NUM_UNIFORMS, count, generator=torch.Generator().manual_seed(seed)).T.contiguous()


def make_plan(cfg: AugmentConfig, size: int, **more: object) -> Plan:
    made = Augment(cfg, num_classes=10, **{**GREY, **more}).plan(size, (size, size))  # type: ignore[arg-type]
    return replace(made, whole_pixels=False)


def largest_difference(
    module: ModuleType, images: Tensor, cfg: AugmentConfig, plan: Plan, count: int, device: str = "cpu"
) -> float:
    """Return the largest difference of kernel and float64 reference in [0, 1] units, over a batch of odd indices."""
    plan = replace(plan, levels=levels_read(cfg, images.shape[-2:], plan.size))
    pyramid = build_pyramid(images, plan.levels[-1]) if plan.levels[-1] else None
    table = augmentation_table(cfg, uniforms(len(images), plan.size), images.shape[-2:], plan.size, whole_pixels=False)
    generator = torch.Generator().manual_seed(plan.size)
    indices, partners = (torch.randint(0, len(images), (count,), generator=generator) for _ in range(2))
    exact = augment_reference(images, pyramid, indices, partners, table.double(), replace(plan, dtype=torch.float64))
    sources = (images, pyramid, indices, partners, table)
    there = [part if part is None else to_device(part, torch.device(device)) for part in sources]
    ours = module.augment_fused(*there, plan).cpu()
    assert ours.shape == (count, len(plan.mean), plan.size, plan.size)
    assert ours.dtype == plan.dtype
    memory_format = torch.channels_last if plan.channels_last else torch.contiguous_format
    assert ours.is_contiguous(memory_format=memory_format)
    std = torch.tensor(plan.std, dtype=torch.float64)[:, None, None]
    return float(((ours.double() - exact) * std).abs().max())


@pytest.mark.parametrize("cfg", [OFF, GEOMETRY, ERASING, ALL, HARD], ids=["off", "geometry", "erasing", "all", "hard"])
@pytest.mark.parametrize("size", [28, 32, 64, 96, 128, 224])
def test_the_kernel_is_the_reference(
    interpreted: ModuleType, train_images: Split, size: int, cfg: AugmentConfig
) -> None:
    count = {28: 7, 32: 7, 64: 5, 96: 3, 128: 3, 224: 1}[size]
    images = train_images.images[:50, None]
    assert largest_difference(interpreted, images, cfg, make_plan(cfg, size), count) < 1e-4  # the bar is 7.8e-3
    rounded = make_plan(cfg, size, dtype=torch.bfloat16)
    assert largest_difference(interpreted, images, cfg, rounded, count) < BAR


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("source", [(1, 28, 28), (3, 32, 32), (3, 20, 31), (1, 17, 40)], ids=str)
def test_shapes_are_arguments(interpreted: ModuleType, source: tuple[int, int, int], channels_last: bool) -> None:
    """MNIST's relatives, CIFAR-like colour, and images that are not square; three channels in the model."""
    images = torch.randint(0, 256, (11, *source), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plan = make_plan(ALL, 40, channels_last=channels_last, **COLOUR)
    assert largest_difference(interpreted, images, ALL, plan, 3) < 1e-4


@pytest.mark.parametrize("source", [(1, 1, 28), (3, 20, 1), (1, 1, 1)], ids=str)
def test_images_of_one_pixel_s_width_leave_the_kernel_alone(
    interpreted: ModuleType, source: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads a pixel and the next one: before the first image, or after the last, there is none."""
    images = torch.randint(0, 256, (11, *source), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.delattr(interpreted, "_augment_kernel")
    assert largest_difference(interpreted, images, ALL, make_plan(ALL, 40, **COLOUR), 3) < 1e-4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("source", "size", "levels"),
    [((3, 32, 32), 40, [0]), ((3, 64, 64), 16, [0, 1, 2]), ((3, 61, 90), 12, [1, 2]), ((1, 120, 70), 35, [0, 1])],
    ids=str,
)
def test_colours_and_levels_are_those_of_the_reference(
    interpreted: ModuleType, source: tuple[int, int, int], size: int, levels: list[int], channels_last: bool
) -> None:
    images = torch.randint(0, 256, (40, *source), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    read = augmentation_table(COLOURS, uniforms(40, size), source[1:], size, whole_pixels=False)[:, LEVEL].unique()
    assert read.tolist() == levels
    plan = make_plan(COLOURS, size, channels_last=channels_last, fill=(0.2, 0.4, 0.6)[: source[0]], **COLOUR)
    assert largest_difference(interpreted, images, COLOURS, plan, 12) < 1e-4


def test_a_batch_through_the_kernel_is_a_batch_through_the_reference(
    interpreted: ModuleType, train_images: Split
) -> None:
    indices = torch.tensor([3, 1999, 0, 77, 500])
    batch = MicroBatch(
        split=train_images,
        indices=indices,
        partners=indices.flip(0),
        uniforms=uniforms(2000),
        epoch=4,
        key=(0, 0, 0),
    )
    cfg = replace(ALL, size={0: 28, 4: 48})
    kernel = Augment(replace(cfg, backend="triton"), num_classes=10, **GREY)
    assert kernel.backend == "triton"
    images, targets = kernel(batch)
    expected_images, expected_targets = Augment(replace(cfg, backend="eager"), num_classes=10, **GREY)(batch)
    assert ((images - expected_images) * 0.353).abs().max() < 1e-4
    assert torch.equal(targets, expected_targets)


def test_the_compiled_reference_gives_the_same_numbers(train_images: Split) -> None:
    every = torch.arange(33)
    batch = MicroBatch(
        split=train_images, indices=every, partners=every.flip(0), uniforms=uniforms(2000), epoch=0, key=(0, 0, 0)
    )
    made = [
        Augment(replace(ALL, size=36, backend=backend), num_classes=10, **GREY)(batch)[0]
        for backend in ("compiled", "eager")
    ]
    assert ((made[0] - made[1]) * 0.353).abs().max() < 1e-4


@pytest.mark.thorough
def test_the_compiled_reference_gives_the_same_colours_and_levels() -> None:
    images = torch.randint(0, 256, (24, 3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split, every = Split(images=images, labels=torch.zeros(24, dtype=torch.int64)), torch.arange(24)
    batch = MicroBatch(
        split=split, indices=every, partners=every.flip(0), uniforms=uniforms(24), epoch=0, key=(0, 0, 0)
    )
    for size in (12, 50):
        made = [
            Augment(replace(COLOURS, size=size, backend=backend), num_classes=10, fill=(0.2, 0.4, 0.6), **COLOUR)
            for backend in ("compiled", "eager")
        ]
        assert (made[0](batch)[0] - made[1](batch)[0]).abs().max() * 0.225 < 1e-4


@pytest.mark.parametrize(
    ("cfg", "channels", "side"),
    [(GEOMETRY, 1, 28), (ALL, 1, 28), (ALL, 3, 32), (COLOURS, 1, 28), (COLOURS, 3, 512)],
    ids=["geometry", "all", "rgb", "grey", "rgb shrunk"],
)
def test_the_kernel_compiles_for_a_gpu(cfg: AugmentConfig, channels: int, side: int) -> None:
    """Triton's whole compiler, for the Hopper generation, on a machine that may have no GPU."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fmnist.data import augment_triton as resample

    kernel = resample._augment_kernel
    last, colours = levels_read(cfg, (side, side), 224)[-1], changes_colours(cfg)
    constants = {"SOURCE_CHANNELS": channels, "HEIGHT": side, "WIDTH": side, "CHANNELS": channels, "SIZE": 224}
    constants |= {"CHANNELS_LAST": False, "LAST_LEVEL": last, "PYRAMID_BYTES": last and 196608, "COLOURS": colours}
    constants |= {"ERASES": cfg.erase > 0, "MIXES": cfg.mixup_alpha > 0, "COLUMNS": 29, "TILE": resample.TILE}
    pointers = {"images": "*u8", "pyramid": "*u8", "indices": "*i64", "partners": "*i64", "table": "*fp32"}
    signature = pointers | {"statistics": "*fp32", "out": "*bf16"} | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = compile_kernel(
        ASTSource(fn=kernel, signature=signature, constexprs=places),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": resample.NUM_WARPS},
    )
    assert len(compiled.asm["cubin"]) > 1000
    assert ".local" not in compiled.asm["ptx"]  # no array lives in local memory
    samples = 2 if cfg.mixup_alpha else 1
    neighbours, branches = 4, 2  # both branches, between source pixels and at the edge, are in the code
    pixels = resample.TILE**2 // (32 * resample.NUM_WARPS)
    assert compiled.asm["ptx"].count("ld.global.b8") == samples * branches * neighbours * pixels * channels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "cfg",
    [OFF, GEOMETRY, ERASING, ALL, HARD, COLOURS],
    ids=["off", "geometry", "erasing", "all", "hard", "colours"],
)
@pytest.mark.parametrize("size", [28, 32, 64, 96, 128, 224])
def test_the_kernel_is_the_reference_on_a_gpu(train_images: Split, size: int, cfg: AugmentConfig) -> None:
    from fmnist.data import augment_triton as resample

    images = train_images.images[:, None]
    for dtype, bar in ((torch.float32, 1e-4), (torch.bfloat16, BAR)):
        assert largest_difference(resample, images, cfg, make_plan(cfg, size, dtype=dtype), 257, "cuda") < bar
    colour = make_plan(cfg, size, channels_last=True, **COLOUR)
    assert largest_difference(resample, images, cfg, colour, 31, "cuda") < 1e-4
    rgb = torch.randint(0, 256, (50, 3, 200, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # float32 knows a place near the 300th pixel to 1.5e-5, after each of some eight operations; noise has slopes of 1
    assert largest_difference(resample, rgb, cfg, colour, 31, "cuda") < 2e-4
