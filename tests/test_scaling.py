"""The arithmetic of experiments/scaling.py, by hand; its constants against the models and data they stand for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import ROOT

from experiments.scaling import CASES, GPUS, begins, measure_planning, row, table
from experiments.spread_large import memory_of, write_set
from fmnist.config.parse import parse_config
from fmnist.config.schema import DataConfig
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.models import build_model
from fmnist.models.flops import flops_per_image
from fmnist.runtime.processes import Processes

CONVNEXT, CNN = CASES.values()


@pytest.mark.thorough
def test_the_constants_are_those_of_the_models() -> None:
    model = timm.create_model("convnext_tiny")
    assert (sum(p.numel() for p in model.parameters()), flops_per_image(model, 3, 224)[1]) == (
        CONVNEXT.parameters,
        CONVNEXT.flops,
    )
    cfg = parse_config(["--config", str(ROOT / "experiments/recipes/cnn_11_epochs.yaml")])
    cnn, _ = build_model(cfg.model, num_classes=10, mean=(0.286,), std=(0.353,), image_size=28, load_weights=False)
    assert (sum(p.numel() for p in cnn.parameters()), flops_per_image(cnn, 1, 28)[1]) == (CNN.parameters, CNN.flops)


def test_a_row_by_hand() -> None:
    one, node, two = (row(CONVNEXT, gpus) for gpus in (1, 8, 16))
    # 1,281,167 images of 196,608 bytes, 236 bytes of tables each, and two buffers of 128 images.
    assert one["bytes"] == 1_281_167 * (196_608 + 236) + 2 * 128 * 196_608
    # ceil(1,281,167 / 8) = 160,146 images on each
    assert node["bytes"] == 160_146 * 196_608 + 1_281_167 * 236 + 2 * 128 * 196_608
    # 128 x 26.704 Gflop at a fifth of 989.5 Tflop/s: 3.41815e12 / 1.979e14 = 17.27 ms
    assert node["compute_s"] == pytest.approx(0.017272, rel=1e-4)
    # 7 of 8 images come from the others: 25.166 MB x 7/8 / 450 GB/s = 48.9 us; PCIe: 63.015 GB/s, 349.4 us
    assert node["exchange_nvlink_s"] == pytest.approx(48.93e-6, rel=1e-3)
    assert node["exchange_pcie_s"] == pytest.approx(349.4e-6, rel=1e-3)
    assert node["exchange_infiniband_s"] == 0 and one["exchange_nvlink_s"] == one["allreduce_nvlink_s"] == 0
    # two nodes: 7 of 16 from the own node, 8 of 16 from the other at 50 GB/s: 25.166 MB / 2 / 50e9 = 251.7 us
    assert two["exchange_nvlink_s"] == pytest.approx(node["exchange_nvlink_s"] / 2)
    assert two["exchange_infiniband_s"] == pytest.approx(251.7e-6, rel=1e-3)
    # 114.36 MB of gradients: 2 x 7/8 / 450 GB/s = 444.7 us; between two nodes an eighth of them once: + 285.9 us
    assert node["allreduce_nvlink_s"] == pytest.approx(444.7e-6, rel=1e-3)
    assert two["allreduce_nvlink_s"] - node["allreduce_nvlink_s"] == pytest.approx(285.9e-6, rel=1e-3)
    assert node["checkpoint_s"] == pytest.approx(3 * 4 * 28_589_128 / 2e9)
    # 8 x 128 pictures of 5 ms in 17.27 ms: 296 cores
    assert node["decoding_cores"] == pytest.approx(296.4, abs=0.1)


def test_where_limits_begin() -> None:
    # 252 GB / 4 + 0.3 GB are 63.3 GB, under 72; on two GPUs 126 GB are not.
    assert begins(CONVNEXT) == {"fits": 4, "exchange": None, "allreduce": None, "messages": None, "epoch": None}
    # 128 x 784 / 32 = 3,136 bytes a message; 55,000 // (64 x 128) = 6 steps an epoch
    assert begins(CNN) == {"fits": 1, "exchange": None, "allreduce": None, "messages": 32, "epoch": 64}


def test_the_page_holds_the_tables() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    assert all(table(case) in page for case in CASES.values())


@pytest.mark.thorough  # in a process of its own, which has no freed memory to take again
def test_a_process_holds_its_share_of_the_images() -> None:
    code = "from experiments.scaling import measure_memory; print(list(measure_memory(8000, 64, (1, 4)).values()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    # 8,000 images of 3 x 64 x 64 bytes; beside them a megabyte at most, of indices and what the allocator keeps.
    (one, four), size = json.loads(done.stdout), 8000 * 3 * 64 * 64
    assert size <= one <= size + 2**20 and size / 4 <= four <= size / 4 + 2**20


def test_planning_is_measured_for_each_count() -> None:
    found = measure_planning(8, GPUS[:3], repeats=3)
    assert found.keys() == {1, 2, 4} and all(0 < seconds < 1 for seconds in found.values())


def test_the_large_set_is_the_same_each_time_and_stays_in_its_file(tmp_path: Path) -> None:
    for name in ("one.npz", "two.npz"):
        write_set(tmp_path / name, 5000)
    one, two = (np.load(tmp_path / name) for name in ("one.npz", "two.npz"))
    assert sorted(one) == sorted(f"{part}_{kind}" for part in ("train", "val", "test") for kind in ("images", "labels"))
    assert {name: len(one[name]) for name in one if "labels" in name} == {
        "train_labels": 5000 - 50 - 16, "val_labels": 50, "test_labels": 16,
    }  # fmt: skip
    assert all(np.array_equal(one[name], two[name]) for name in one)
    images, labels = one["train_images"], one["train_labels"]
    assert images.shape == (4934, 64, 64, 3) and not np.array_equal(images[0], images[10])  # one class, other noise
    means = np.stack([images[labels == label].mean(0) for label in range(10)])
    assert np.abs(means[:, None] - means[None]).mean((2, 3, 4))[~np.eye(10, dtype=bool)].min() > 10
    source = open_source(DataConfig(name="npz", root=str(tmp_path / "one.npz")), processes=Processes(0, 1))
    assert all(Split.load(name, source, read=False).unread is not None for name in ("train", "val", "test"))  # type: ignore[arg-type]


def test_memory_is_that_of_a_launchers_processes() -> None:
    code = "import sys; held = bytearray(50_000_000); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        held = memory_of(os.getpid())[child.pid]
        child.stdin.close()
    assert 50e6 < held["RssAnon"] < 100e6 and 0 < held["RssFile"] < 50e6
    assert child.pid not in memory_of(os.getpid())
