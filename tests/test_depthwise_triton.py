"""Our depthwise kernels against convolutions in float64: interpreted, compiled for a GPU, run on one; in models."""

import copy
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fmnist.models.fast_layers import PLAIN, depthwise_without_effect, use_convolutions, use_fast_layers
from fmnist.models.residual import use_lean_residual
from fmnist.models.triton_layers import TritonConv2d, describe_triton, fits_triton

triton = pytest.importorskip("triton")
CPU = torch.device("cpu")
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2}  # of a ConvNeXt
CONVNEXT = [(56, 96, 7), (28, 192, 7), (14, 384, 7), (7, 768, 7)]  # side, channels, kernel of ConvNeXt-Tiny at 224 px
OTHERS = [(112, 96, 3), (28, 240, 5), (32, 40, 7), (8, 320, 9)]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels run by Triton's interpreter: which one runs them is decided where they are defined."""
    from fmnist.models import depthwise_kernels, depthwise_triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.reload(depthwise_kernels)
        for name in ("convolve", "correlate"):
            monkeypatch.setattr(depthwise_triton, name, getattr(depthwise_kernels, name))
        yield
    importlib.reload(depthwise_kernels)


def layer(channels: int, kernel: int, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)


def results(conv: nn.Conv2d, images: Tensor, gradient: Tensor, exact: bool = False) -> list[Tensor]:
    """Return output and gradients, by our kernel or by torch in float64."""
    if exact:
        conv, images, gradient = copy.deepcopy(conv).double(), images.double(), gradient.double()
    images = images.detach().requires_grad_()
    parameters = list(conv.parameters())
    if exact:
        out = F.conv2d(images, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2, groups=len(conv.weight))
    else:
        from fmnist.models.depthwise_triton import depthwise_triton

        out = depthwise_triton(images, conv.weight, conv.bias)
    return [out.detach(), *torch.autograd.grad(out, [images, *parameters], gradient)]


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert [part.shape for part in found] == [part.shape for part in wanted]
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(found, wanted, strict=True))


CASES = [  # batch, channels, height, width, kernel
    (1, 5, 7, 7, 7),
    (3, 40, 5, 14, 3),  # not a multiple of a block's channels
    (1, 20, 10, 13, 5),
    (3, 4, 1, 1, 7),  # most of the kernel lies outside
    (2, 33, 2, 3, 9),
    (1, 32, 9, 30, 3),  # several strips, the last of them not whole
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("interpreted")
def test_the_kernels_are_the_convolution(case: tuple[int, int, int, int, int]) -> None:
    batch, channels, height, width, kernel = case
    conv = layer(channels, kernel)
    images, gradient = (torch.randn(batch, channels, height, width) for _ in range(2))
    found = results(conv, images.contiguous(memory_format=torch.channels_last), gradient)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert largest_error(found, results(conv, images, gradient, exact=True)) < 1e-5
    assert [part.stride() for part in found[2:]] == [part.stride() for part in conv.parameters()]


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.usefixtures("interpreted")
def test_bfloat16_under_autocast_any_memory_format_and_no_bias(kernel: int) -> None:
    conv = layer(24, kernel, bias=kernel == 5)
    images = torch.randn(2, 24, 6, 7)
    gradient = torch.randn(2, 24, 6, 7).bfloat16()
    wanted = results(conv, images.bfloat16(), gradient, exact=True)
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        several = [results(conv, given, gradient) for given in (images, turned)]
    for found in several:
        assert [part.dtype for part in found] == [torch.bfloat16, *[torch.float32] * (len(found) - 1)]
        assert largest_error(found, wanted) < 1e-2
        assert largest_error(found[2:], wanted[2:]) < 1e-5  # those of the parameters are not rounded
        assert all(torch.equal(a, b) for a, b in zip(found, several[0], strict=True))


@pytest.mark.usefixtures("interpreted")
def test_gradients_have_the_strides_of_their_parameters() -> None:
    """Those of sides of length 1, too: DDP compares all, and warns of a slower training where one differs."""
    conv = layer(16, 3).to(memory_format=torch.channels_last)
    out = results(conv, torch.randn(2, 16, 5, 6), torch.randn(2, 16, 5, 6))
    assert conv.weight.stride() == (9, 1, 3, 1)
    assert [part.stride() for part in out[2:]] == [(9, 1, 3, 1), (1,)]


@pytest.mark.usefixtures("interpreted")
def test_only_the_gradients_wanted_and_parameters_of_any_dtype() -> None:
    from fmnist.models.depthwise_triton import depthwise_triton

    conv = layer(6, 3)
    images = torch.randn(1, 6, 4, 5, requires_grad=True)
    wanted = [torch.autograd.grad(conv(images).square().sum(), part)[0] for part in (images, conv.weight, conv.bias)]
    for needed in range(3):
        parts = [part.detach().requires_grad_(i == needed) for i, part in enumerate((images, conv.weight, conv.bias))]
        depthwise_triton(*parts).square().sum().backward()
        for i, part in enumerate(parts):
            assert (part.grad is None) == (i != needed)
        torch.testing.assert_close(parts[needed].grad, wanted[needed], rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(conv).bfloat16()
    found = results(half, images.bfloat16(), torch.ones(1, 6, 4, 5).bfloat16())
    assert {part.dtype for part in found} == {torch.bfloat16}
    assert largest_error(found, results(half, images.bfloat16(), torch.ones(1, 6, 4, 5).bfloat16(), exact=True)) < 1e-2


@pytest.mark.thorough
@pytest.mark.usefixtures("interpreted")
def test_torch_compiles_it_whole_and_its_layout_is_known() -> None:
    from fmnist.models import depthwise_triton  # noqa: F401 - which registers the operators

    conv = layer(16, 3)
    images = torch.randn(2, 16, 5, 6).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fmnist.depthwise.default, (images.requires_grad_(), conv.weight, conv.bias, False))
    torch.library.opcheck(torch.ops.fmnist.depthwise_weights.default, (images.detach(), images.detach(), 3))

    images = images.detach().requires_grad_()
    model = nn.Sequential(conv)
    use_fast_layers(model, "triton", CPU)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(images)
        assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [images, *conv.parameters()])])
        assert found[-1][1].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["convnext_atto", "tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_put_in_and_taken_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options: dict[str, Any] = SMALL if name == "convnext_atto" else {}
    model = timm.create_model(name, in_chans=1, num_classes=10, **options)
    kinds, attributes = ([f(module) for module in model.modules()] for f in (type, lambda module: set(vars(module))))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    use_fast_layers(model, "triton", CPU)
    ours = [module for module in model.modules() if isinstance(module, TritonConv2d)]
    assert len(ours) == {"convnext_atto": 4, "tf_efficientnet_lite0": 12, "mobilenetv3_small_050": 7}[name]
    assert all(module.stride == (1, 1) and module.groups == module.in_channels for module in ours)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        kept = model.eval()(images)
    program = torch.export.export(model, (images,))
    assert not any("fmnist" in str(node.target) for node in program.graph.nodes)
    use_convolutions(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == attributes
    with torch.no_grad():
        assert torch.equal(model(images), kept)


@pytest.mark.usefixtures("interpreted")
def test_a_model_trains_to_the_same_gradients() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("convnext_atto", in_chans=1, num_classes=10, **SMALL)
    ours = copy.deepcopy(plain)
    use_fast_layers(ours, "triton", CPU)
    images = torch.randn(1, 1, 32, 32)
    for model in (plain, ours):
        model(images).logsumexp(-1).sum().backward()
    for (key, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-6, key


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 9, "padding": "same"}, True),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
        ({"kernel_size": 3, "padding": 0}, False),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, False),
        ({"kernel_size": 4, "padding": "same"}, False),
        ({"kernel_size": (1, 11), "padding": (0, 5)}, False),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, False),
        ({"kernel_size": 11, "padding": 5}, False),
        ({"kernel_size": 1}, False),
    ],
    ids=str,
)
def test_what_it_fits(options: dict[str, Any], fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = nn.Sequential(nn.Conv2d(4, 4, groups=4, **options), nn.Conv2d(4, 8, 3, padding=1, groups=4))
    assert fits_triton(model[0]) == fits
    use_fast_layers(model, "triton", CPU)
    assert [type(module) for module in model] == [TritonConv2d if fits else nn.Conv2d, nn.Conv2d]


def test_only_who_asks_for_the_kernel_gets_it() -> None:
    """It was measured layer by layer, and in no whole step yet."""
    for choice in ("auto", "conv"):
        conv = layer(96, 7)
        use_fast_layers(conv, choice, torch.device("cuda"))  # type: ignore[arg-type]
        assert type(conv) is nn.Conv2d


def test_what_it_cannot_take_is_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    conv = layer(4, 3)
    use_fast_layers(conv, "triton", CPU)
    assert type(conv) is TritonConv2d
    assert conv(torch.zeros(4, 8, 8)).shape == (4, 8, 8)  # an image without a batch
    assert conv(torch.zeros(0, 4, 8, 8)).shape == (0, 4, 8, 8)
    assert conv.double()(torch.zeros(1, 4, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_a_setting_without_effect_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(model: nn.Module) -> str:
        use_fast_layers(model, "triton", CPU)
        assert any(type(module) in PLAIN for module in model.modules()) == (
            not depthwise_without_effect(model, "triton", 1, [32])
        )
        return depthwise_without_effect(model, "triton", 1, [32])

    convnext = timm.create_model("convnext_atto", in_chans=1, **SMALL)
    assert said(convnext) == "triton has no effect: it needs a CUDA device and the package triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert said(convnext) == ""
    wide = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 11, groups=4))
    kernels = "3 x 3, 5 x 5, 7 x 7, 9 x 9"
    fitting = f"no depthwise convolution has a kernel of {kernels}, stride 1 and as much padding"
    assert said(wide) == f"triton has no effect: {fitting}"
    without = timm.create_model("resnet10t", in_chans=1)
    assert said(without) == "triton has no effect: the model has no plain depthwise convolution"


@pytest.mark.parametrize(
    ("choice", "sizes", "said"),
    [
        (
            "triton",
            [32],
            "4 depthwise convolutions by our kernel: Triton compiles 8 kernels at the first start, about 10 s each",
        ),
        (
            "triton",
            [32, 64],
            "4 depthwise convolutions by our kernel: Triton compiles 12 kernels at the first start, about 10 s each",
        ),  # two maps are in both
        ("auto", [32], ""),
    ],
)
def test_the_start_says_what_is_compiled(
    choice: Any, sizes: list[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = timm.create_model("convnext_atto", in_chans=1, **SMALL)
    use_fast_layers(model, choice, torch.device("cuda"))
    assert re.fullmatch(said, describe_triton(model, 1, sizes))


class Seen(TorchDispatchMode):
    """Note what each operator makes of a batch's maps."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.maps = batch, list[tuple[str, Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and out.dim() == 4 and len(out) == self.batch and min(out.shape) > 1:
            self.maps.append((str(func), out))
        return out


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
@pytest.mark.parametrize("conv_mlp", [False, True])
def test_a_whole_convnext_on_a_cuda_device(name: str, conv_mlp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtypes and layouts as they are there, of tensors without memory: maps are bf16, and all take the kernel."""
    from fmnist.models import depthwise_triton  # noqa: F401 - which registers the operators

    def as_cudnn(images: Tensor, weight: Tensor, _: Any) -> torch.memory_format:
        pixels = any(
            part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()
            for part in (images, weight)
        )
        return torch.channels_last if pixels else torch.contiguous_format

    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch._C._conv_determine_backend_memory_format", as_cudnn)
    options: dict[str, Any] = {"depths": [2, 1, 1, 1], "dims": [32, 48, 64, 64], "patch_size": 4}
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.2, conv_mlp=conv_mlp, **options)
    with FakeTensorMode():
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    there = torch.empty(p.shape, device="cuda")
                    module._parameters[key] = nn.Parameter(
                        there.to(memory_format=torch.channels_last) if p.dim() == 4 else there
                    )
        use_fast_layers(model, "triton", torch.device("cuda"))
        use_lean_residual(model)
        images = torch.empty(5, 3, 64, 64, device="cuda", dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast("cuda", torch.bfloat16), Seen(len(images)) as seen:
            assert describe_triton(model, 3, [64]).startswith("5 depthwise convolutions by our kernel")
            model.train()
            seen.maps.clear()
            model(images)
    assert not [(operator, out.shape) for operator, out in seen.maps if out.dtype != torch.bfloat16]
    ours = [out for operator, out in seen.maps if operator == "fmnist.depthwise.default"]
    assert [tuple(out.shape[1:]) for out in ours] == [*[(32, 16, 16)] * 2, (48, 8, 8), (64, 4, 4), (64, 2, 2)]
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in ours)


def compiled_for_a_gpu(name: str, side: int, channels: int, kernel: int, dtype: str) -> Any:
    """Triton's whole compiler, for the Hopper generation, on a machine that may have no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fmnist.models import depthwise_kernels, depthwise_triton

    function = getattr(depthwise_kernels, name)
    images = torch.empty((256, channels, side, side), device="meta")
    choose = depthwise_triton.forward_tile if name == "convolve" else depthwise_triton.weights_tile
    constants = depthwise_triton.constants(images, kernel, choose(images, kernel))
    warps = constants.pop("num_warps")
    pointers = {"images": f"*{dtype}"}
    if name == "convolve":
        pointers |= {"weight": "*fp32", "bias": "*fp32", "out": f"*{dtype}"}
        numbers = {"batch": "i32", "first": "i32", "step": "i32", "biased": "i32"}
    else:
        pointers |= {"gradient": f"*{dtype}", "out": "*fp32"}
        numbers = {"batch": "i32"}
    places = {(function.arg_names.index(key),): value for key, value in constants.items()}
    aligned = {(function.arg_names.index(key),): [["tt.divisibility", 16]] for key in pointers}
    source = ASTSource(
        fn=function,
        signature=pointers | numbers | dict.fromkeys(constants, "constexpr"),
        constexprs=places,
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


@pytest.mark.parametrize("name", ["convolve", "correlate"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((112, 96, 3), "bf16"),
        pytest.param((112, 96, 3), "fp32", marks=pytest.mark.thorough),
        *(pytest.param(shape, "bf16", marks=pytest.mark.thorough) for shape in (CONVNEXT[0], CONVNEXT[-1])),
        *(pytest.param(shape, "bf16", marks=pytest.mark.slow) for shape in (*CONVNEXT[1:-1], *OTHERS[1:])),
        *(pytest.param(shape, "fp32", marks=pytest.mark.slow) for shape in CONVNEXT),
    ],
    ids=str,
)
def test_it_compiles_for_a_gpu_and_stays_in_registers(
    name: str, shape: tuple[int, int, int], dtype: str, tmp_path: Path
) -> None:
    compiled = compiled_for_a_gpu(name, *shape, dtype)
    assert ".local" not in compiled.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])  # sums in a fixed order
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.exists():
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        told = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True).stdout
        registers, stack, local = (int(re.findall(rf"{key}:(\d+)", told)[0]) for key in ("REG", "STACK", "LOCAL"))
        assert registers <= 255 and stack == local == 0  # nothing is spilled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*CONVNEXT, *OTHERS], ids=lambda shape: "{0}x{0}x{1}-{2}".format(*shape))
def test_the_kernels_are_the_convolution_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype, bar: float) -> None:
    side, channels, kernel = shape
    conv = layer(channels, kernel).cuda()
    made = (torch.randn(16, channels, side, side, device="cuda").to(dtype) for _ in range(2))
    images, gradient = (part.contiguous(memory_format=torch.channels_last) for part in made)
    found, again = (results(conv, images, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    wanted = results(conv, images, gradient, exact=True)
    assert largest_error(found, wanted) < bar
    assert largest_error(found[2:], wanted[2:]) < 1e-5  # the parameters' gradients are in float32
    contiguous = results(conv, images.contiguous(), gradient.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, contiguous, strict=True))
