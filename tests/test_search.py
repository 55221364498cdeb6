"""Neighbours are those of float64, precision is what the fingers count, and the command does what its help says."""

import csv
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fmnist.apps.search.retrieval import (
    Neighbours,
    precision_at_k,
    precision_file,
    read_precision,
    summarize_precision,
)
from fmnist.evaluation.write import write_outcome
from PIL import Image
from small import NUM_TEST, NUM_TRAIN, VAL_SIZE, command, untrained, write_small_data

from fmnist.apps.search.__main__ import main as search_main
from fmnist.apps.search.catalogue import Catalogue, load_catalogue, save_catalogue
from fmnist.config.schema import ModelConfig
from fmnist.data.fashion_mnist import CLASS_NAMES, load_split
from fmnist.evaluation.outcome import Request, evaluate
from fmnist.evaluation.retrieval import precision_of
from fmnist.network import open_trained
from fmnist.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMNIST_DATA", str(write_small_data(tmp_path_factory.mktemp("data"))))
        yield


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    return untrained(folder / "run", ModelConfig(name="cnn", options={"widths": [8, 16, 32]}), 28)


@pytest.fixture(scope="module")
def index(run_directory: Path) -> Path:
    search("index", run_directory, "--split", "val")
    return run_directory / "search" / "index.npz"


def search(*args: object, status: int = 0) -> str:
    return command(search_main, *args, status=status)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4], ids=["apart", "close", "closer than float32 tells"])
def test_neighbours_are_those_of_float64_over_all_items(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.ones(3000, 64, dtype=torch.float64) + spread * torch.randn(
        3000, 64, generator=generator, dtype=torch.float64
    )
    items[100:140] = items[7]  # forty equal ones, more than the spare candidates: the lower positions come first
    queries = torch.cat([items[5:9], items[:100] + spread * torch.rand(100, 64, generator=generator)])
    cosines = F.normalize(queries, dim=1) @ F.normalize(items, dim=1).T
    cosines[:, 100:140] = cosines[:, 7:8]  # a product, summed in blocks, may tell them apart in the last bit
    expected, order = cosines.sort(dim=1, descending=True, stable=True)
    similarities, positions = Neighbours(items, CPU)(queries, 10)
    assert torch.allclose(similarities, expected[:, :10], atol=1e-13)
    assert torch.equal(positions, order[:, :10])


def test_the_query_itself_does_not_count() -> None:
    items = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).half()
    neighbours = Neighbours(items, CPU)
    itself = torch.arange(200)
    with_itself, without = neighbours(items, 5)[1], neighbours(items, 4, itself)[1]
    assert torch.equal(with_itself[:, 0], itself)
    assert torch.equal(without, with_itself[:, 1:])
    assert neighbours(items, 199, itself)[1].shape == (200, 199)
    with pytest.raises(ValueError, match="k is 200; legal: 1 to 199"):
        neighbours(items, 200, itself)
    with pytest.raises(ValueError, match="k is 0"):
        neighbours(items, 0)
    assert neighbours(items[:0], 3)[0].shape == (0, 3)


def test_precision_by_hand() -> None:
    # Items on a quarter circle, at 0, 10, 20, 60, 70 and 90 degrees, of classes 0 0 1 1 1 0.
    angles = torch.tensor([0.0, 10.0, 20.0, 60.0, 70.0, 90.0]).deg2rad()
    items, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 0, 1, 1, 1, 0])
    neighbours = Neighbours(items, CPU)
    queries = torch.tensor([4.0, 66.0]).deg2rad()
    queries = torch.stack([queries.cos(), queries.sin()], dim=1)
    # 4 degrees, class 0: the nearest three lie at 0 (0), 10 (0), 20 (1): 2/3. 66 degrees, class 1: 70 (1), 60 (1) and
    # 90 (0, 24 degrees off): 2/3.
    precision = precision_at_k(neighbours, labels, queries, torch.tensor([0, 1]), 3)
    assert torch.allclose(precision, torch.tensor([2 / 3, 2 / 3], dtype=torch.float64))
    # Each item against the others, k = 2: 0 -> 10 20: 1/2; 10 -> 0 20: 1/2; 20 -> 10 0: 0; 60 -> 70 90 (90 is 30
    # off, 20 is 40 off): 1/2; 70 -> 60 90: 1/2; 90 -> 70 60: 0.
    precision = precision_at_k(neighbours, labels, items, labels, 2, torch.arange(6))
    assert precision.tolist() == [0.5, 0.5, 0.0, 0.5, 0.5, 0.0]
    # Class 0: (1/2 + 1/2 + 0) / 3; class 1: (0 + 1/2 + 1/2) / 3; class 2 was never asked for.
    summary = summarize_precision(precision, labels, ["a", "b", "c"])
    assert summary["mean"] == pytest.approx(1 / 3)
    assert summary["per_class"] == {"a": pytest.approx(1 / 3), "b": pytest.approx(1 / 3), "c": None}
    # Variance of (0.5 0.5 0 0.5 0.5 0) with n - 1 = 5: (4 x (1/6)^2 + 2 x (1/3)^2) / 5 = 1/15.
    half = 1.96 * (1 / 15) ** 0.5 / 6**0.5
    assert summary["interval"] == pytest.approx([1 / 3 - half, 1 / 3 + half])


def test_index_holds_unit_float16_features_and_no_pickle(run_directory: Path, index: Path) -> None:
    with np.load(index, allow_pickle=False) as file:
        assert {name: file[name].dtype.str for name in file.files} == {
            **{"features": "<f2", "labels": "<i2", "predictions": "<i2", "images": "|u1"},
            **{"names": "|u1", "about": "|u1"},
        }
    catalogue = load_catalogue(index)
    images, labels = load_split("val", None, VAL_SIZE)
    assert torch.equal(catalogue.images, images) and torch.equal(catalogue.labels.long(), labels)
    assert catalogue.features.shape == (VAL_SIZE, 32)  # the small CNN's last width
    assert torch.allclose(catalogue.features.float().norm(dim=1), torch.ones(VAL_SIZE), atol=2e-3)
    assert catalogue.names[17] == "val:17" and catalogue.run == "run" and catalogue.source == "val"


def test_query_by_split_and_by_file(run_directory: Path, index: Path, tmp_path: Path) -> None:
    image = load_split("val", None, VAL_SIZE)[0][17].numpy()
    Image.fromarray(image).save(tmp_path / "$odd_{name}.png")  # matplotlib would take it for a formula
    out = tmp_path / "sheet.png"
    query = ("val:17", "test:3", tmp_path / "$odd_{name}.png")
    done = search("query", run_directory, *query, "--k", 12, "--output", out)
    assert "ms a query" in done
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000
    rows = rows_of(out.with_suffix(".csv"))
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 13)] * 3
    assert "val:17" not in [row["item"] for row in rows[:12]]  # the query itself does not count
    # As a file it is another picture, whose nearest is the one it was made from.
    assert rows[24]["item"] == "val:17" and float(rows[24]["similarity"]) == pytest.approx(1, abs=1e-3)
    labels = load_split("val", None, VAL_SIZE)[1]
    assert all(row["class"] == CLASS_NAMES[labels[int(row["item"][4:])]] for row in rows)
    similarities = [float(row["similarity"]) for row in rows[:12]]
    assert similarities == sorted(similarities, reverse=True)


def test_folder_index_leaves_bad_files_out(run_directory: Path, tmp_path: Path) -> None:
    images, _ = load_split("test", None, VAL_SIZE)
    (tmp_path / "shop" / "below").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(images[i].numpy()).save(tmp_path / "shop" / "below" / f"{i}.png")
    (tmp_path / "shop" / "broken.jpg").write_bytes(b"<html>")
    index = tmp_path / "shop.npz"
    done = search("index", run_directory, "--folder", tmp_path / "shop", "--output", index)
    assert "left out" in done and "broken.jpg" in done
    catalogue = load_catalogue(index)
    assert catalogue.names == [f"below/{i}.png" for i in range(4)] and catalogue.labels.tolist() == [-1] * 4
    assert torch.equal(catalogue.images, images[:4])
    search("query", index, tmp_path / "shop" / "below" / "2.png")
    rows = rows_of(tmp_path / "search.csv")
    assert {row["item"] for row in rows} == {f"below/{i}.png" for i in (0, 1, 3)}  # fewer than ten; not itself
    assert all(row["class"] == "" and row["predicted"] in CLASS_NAMES for row in rows)


def test_evaluate_prints_a_table_and_writes_json(run_directory: Path, index: Path, tmp_path: Path) -> None:
    out = tmp_path / "precision.json"
    done = search("evaluate", run_directory, "--k", 3, "--output", out)
    result = json.loads(out.read_text())
    assert (result["k"], result["num_queries"], result["num_items"]) == (3, NUM_TEST, NUM_TRAIN - VAL_SIZE)
    assert f"{100 * result['features']['mean']:.2f} %" in done
    for space in ("features", "pixels"):
        per_class = result[space]["per_class"]
        assert list(per_class) == list(CLASS_NAMES)
        shares = load_split("test", None, VAL_SIZE)[1].bincount() / NUM_TEST
        weighted = sum(share * per_class[name] for share, name in zip(shares, CLASS_NAMES, strict=True))
        assert weighted == pytest.approx(result[space]["mean"])
    assert result["pixels"]["mean"] > 0.7
    # In its own place the next report finds it, as long as the weights are these.
    trained = open_trained(run_directory)
    assert read_precision(trained) is None
    search("evaluate", run_directory, "--k", 3)
    assert read_precision(trained) == result
    assert read_precision(trained, "elsewhere") is None  # of other images
    precision_file(trained).write_text(out.read_text().replace(result["weights_sha256"], "0" * 64))
    assert read_precision(trained) is None


def test_a_report_measures_it_once_where_that_is_quick(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained = open_trained(run_directory)
    precision_file(trained).unlink(missing_ok=True)
    outcome = evaluate(trained, Run(trained.cfg, run_directory), Request())
    assert outcome is not None and outcome.cost is not None
    for without in (replace(outcome, trained=None), replace(outcome, split="val"), replace(outcome, cost=None)):
        assert precision_of(without, CPU) is None
    # 1,500 training and 1,100 test images at one a second: 43 minutes.
    timing = replace(outcome.cost.timings[-1], images_per_second=1.0)
    slow = replace(outcome, cost=replace(outcome.cost, timings=(timing,)))
    monkeypatch.setattr(logging.getLogger("fmnist"), "propagate", True)
    with caplog.at_level(logging.INFO, "fmnist"):
        assert precision_of(slow, CPU) is None
    assert "2,600 images take about 43 minutes here" in caplog.text
    assert f"python -m fmnist.apps.search evaluate {run_directory}" in caplog.text
    result = precision_of(outcome, CPU)
    assert result is not None and (result["k"], result["num_queries"]) == (10, NUM_TEST)
    monkeypatch.delattr("fmnist.evaluation.retrieval.measure_precision")  # from here on it is read
    assert precision_of(outcome, CPU) == precision_of(slow, CPU) == result
    # The run was never finished and has no summary.json: its page is written all the same.
    written = write_outcome(replace(outcome, directory=run_directory / "page"), None, result, quick=False)
    assert written["retrieval"] == result
    text = (run_directory / "page" / "report.txt").read_text()
    assert (
        f"precision at 10, 1,100 test images among 1,500 training images: {100 * result['features']['mean']:.2f} %"
        in text
    )
    assert '<section id="retrieval">' in (run_directory / "page" / "report.html").read_text()


def test_an_index_of_other_weights_is_refused(run_directory: Path, index: Path, tmp_path: Path) -> None:
    other = untrained(tmp_path / "other", ModelConfig(name="mlp", options={"width": 32}), 28)
    done = search("query", index, "test:0", "--run", other, status=2)
    missing = search("query", other, "test:0", status=2)
    assert "has no index yet; make one: python -m fmnist.apps.search index" in missing
    assert "was made by other weights (run, sha256" in done


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("query", "INDEX", "test:1100"), "test has images 0 to 1099"),
        (("query", "INDEX", "nothing.png"), "nothing.png: no such file"),
        (("query", "nothing.npz", "test:0"), "there is no index"),
        (("query", "PICKLE", "test:0"), "is not an index of this version"),
        (("query", "README.md", "test:0"), "is not an index of this version"),
        (("query", "tests", "test:0"), "not a run directory"),
        (("index", "RUN", "--folder", "configs"), "a folder without pictures"),
        (("index", "RUN", "--folder", "nowhere"), "is not a folder"),
        (("index", "tests"), "not a run directory"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], message: str, index: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "pickle.npz", features=np.array([{"a": 1}], dtype=object))
    known = {"INDEX": index, "RUN": index.parent.parent, "PICKLE": tmp_path / "pickle.npz"}
    assert message in search(*(known.get(arg, arg) for arg in args), status=2)


def test_a_damaged_index_is_refused(index: Path, tmp_path: Path) -> None:
    catalogue, path = load_catalogue(index), tmp_path / "index.npz"
    for changes in (
        {"names": catalogue.names[:-1]},
        {"labels": catalogue.labels + 1},
        {"features": torch.full_like(catalogue.features, torch.nan)},
        {"features": catalogue.features.float()},
    ):
        save_catalogue(Catalogue(**(vars(catalogue) | changes)), path)
        with pytest.raises(ValueError, match="is not an index of this version"):
            load_catalogue(path)
    data = index.read_bytes()
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="is not an index of this version"):
            load_catalogue(path)
