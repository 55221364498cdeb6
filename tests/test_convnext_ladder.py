"""The race of ConvNeXt's training steps: a dry pass on a CPU, with every field of a published result."""

import json
from pathlib import Path

import pytest
import torch

from experiments import convnext_ladder
from fmnist.models.residual import LeanBlock
from fmnist.runtime.compute import Compute


def test_a_dry_pass_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(convnext_ladder.RUNGS, "eager, of an unknown option", {"no_such": 1})
    output = tmp_path / "ladder.json"
    convnext_ladder.main(
        ["--output", str(output), "--device", "cpu", "--only", "eager", "--rounds", "3", "--steps", "2"]
    )
    found = json.loads(output.read_text())
    assert {"command", "date", "hardware", "versions", "git_revision", "load"} <= found.keys()
    assert list(found["rungs"]) == [
        "eager, timm's residual", "eager", "eager, channels_last", "eager, channels_last, cuDNN by trial",
    ]  # fmt: skip
    for entry in found["rungs"].values():
        assert entry["rounds"] == 3 and 0 < entry["lowest"] <= entry["images_per_second"] <= entry["highest"]
        # 4 + 2 steps to warm up, then 3 + 2 a round, from the same weights on the same batch: ln 10 = 2.30 at first
        assert entry["loss"] == pytest.approx(found["rungs"]["eager"]["loss"], abs=0.02) and 0.5 < entry["loss"] < 2.4
        assert "mfu" not in entry  # ceilings are a GPU's
    assert list(found["failed"]) == ["eager, of an unknown option"] and "no_such" in str(found["failed"])
    for classes in found["kernel_classes"].values():
        assert len(classes.pop("longest")) == 12
        assert sum(classes.values()) == pytest.approx(1, abs=0.01)
    assert "eager, channels_last" in capsys.readouterr().out.split("of the first")[1]


def test_timms_residual_is_raced_against_ours() -> None:
    base, cudnn = convnext_ladder.small_config(), torch.backends.cudnn
    with Compute(precision="bf16", device="cpu") as compute:
        for options, lean in (({}, True), ({convnext_ladder.STOCK: True}, False)):
            rung = convnext_ladder.build(options, base, compute, 2)
            assert any(isinstance(part, LeanBlock) for part in rung.trainer.model.modules()) == lean
            seen: list[tuple[bool, bool]] = []
            rung.trainer.model.register_forward_hook(
                lambda *_, s=seen: s.append((cudnn.benchmark, cudnn.deterministic))
            )
            assert rung.steps(3) == 6
            assert seen == [(False, True) if lean else (True, False)] * 3
            assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
            images, labels = rung.batch.next()
            assert images.dtype == torch.bfloat16 and images.shape == (2, 1, 32, 32) and labels.shape == (2,)


def test_a_kernel_is_sorted_by_its_name() -> None:
    for name, kind in (
        ("triton_red_fused__to_copy_convolution_native_layer_norm_permute_1", "compiled"),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "matrix products"),
        ("dgrad2d_c1_k1_nhwc_specialized", "depthwise and other convolutions"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(", "norms"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda(at", "copies"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl(at::Tenso", "other"),
    ):
        assert convnext_ladder.kind_of(name) == kind
