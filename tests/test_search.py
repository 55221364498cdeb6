"""Neighbours are those of float64 to float32 rounding, precision is checked by hand, the command does what it says."""

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import NUM_TEST, NUM_TRAIN, VAL_SIZE, command, rows_of, untrained

from fmnist.apps.search.__main__ import main as search_main
from fmnist.apps.search.catalogue import UNKNOWN, Catalogue, folder_catalogue, load_catalogue, save_catalogue
from fmnist.apps.search.hits import Hit, plot_hits
from fmnist.apps.search.queries import nearer
from fmnist.config.schema import ModelConfig
from fmnist.data.fashion_mnist import CLASS_NAMES, load, load_indexed, load_split
from fmnist.evaluation import features
from fmnist.evaluation.findings import findings
from fmnist.evaluation.neighbours import Neighbours, precision_at_k
from fmnist.evaluation.outcome import Request, evaluate
from fmnist.evaluation.retrieval import retrieval_key, retrieval_of, summarize_precision
from fmnist.report.retrieval_table import RETRIEVAL_FILE, read_precision
from fmnist.report.write import write_evaluation
from fmnist.runtime.compute import Compute
from fmnist.trained import open_trained

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small_data")


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    return untrained(folder / "run", ModelConfig(name="cnn", options={"widths": [8, 16, 32]}), 28)


@pytest.fixture(scope="module")
def index(run_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four test images as picture files in a folder, with a file that is none, and their index."""
    shop = tmp_path_factory.mktemp("catalogue") / "shop"
    (shop / "below").mkdir(parents=True)
    for i, image in enumerate(load_split("test", None, VAL_SIZE)[0][:4].numpy()):
        Image.fromarray(image).save(shop / "below" / f"{i}.png")
    (shop / "broken.jpg").write_bytes(b"<html>")
    done = search("index", run_directory, "--folder", shop, "--output", shop.parent / "shop.safetensors")
    assert "left out" in done and "broken.jpg" in done and "4 pictures, 32 features each" in done
    return shop.parent / "shop.safetensors"


def search(*args: object, status: int = 0) -> str:
    return command(search_main, *args, status=status)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4], ids=["apart", "close", "closer than float32 tells"])
def test_neighbours_are_those_of_float64_over_all_items(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.ones(3000, 64, dtype=torch.float64) + spread * torch.randn(
        3000, 64, generator=generator, dtype=torch.float64
    )
    items[100:140] = items[7]  # forty equal ones
    queries = torch.cat([items[5:9], items[:100] + spread * torch.rand(100, 64, generator=generator)])
    cosines = F.normalize(queries, dim=1) @ F.normalize(items, dim=1).T
    expected = cosines.sort(dim=1, descending=True).values[:, :10]
    similarities, positions = Neighbours(items, CPU)(queries, 10)
    assert torch.allclose(similarities.double(), expected, atol=1e-6)
    # Whatever float32 cannot tell apart may change places: the items found are as near as the nearest, to rounding.
    assert torch.allclose(cosines.gather(1, positions), expected, atol=1e-6)
    assert all(len(set(row)) == 10 for row in positions.tolist())


def test_the_query_itself_does_not_count() -> None:
    items = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).half()
    neighbours = Neighbours(items, CPU)
    itself = torch.arange(200)
    with_itself, without = neighbours(items, 5)[1], neighbours(items, 4, itself)[1]
    assert torch.equal(with_itself[:, 0], itself)
    assert torch.equal(without, with_itself[:, 1:])
    assert neighbours(items, 199, itself)[1].shape == (200, 199)
    with pytest.raises(ValueError, match="k is 200; valid range: 1 to 199"):
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
    positions = neighbours(items, 2, torch.arange(6))[1]
    precision = (labels[positions] == labels[:, None]).double().mean(1)
    assert precision.tolist() == [0.5, 0.5, 0.0, 0.5, 0.5, 0.0]
    # Class 0: (1/2 + 1/2 + 0) / 3; class 1: (0 + 1/2 + 1/2) / 3; class 2 was never asked for.
    summary = summarize_precision(precision, labels, ["a", "b", "c"])
    assert summary["mean"] == pytest.approx(1 / 3)
    assert summary["per_class"] == {"a": pytest.approx(1 / 3), "b": pytest.approx(1 / 3), "c": None}
    # Variance of (0.5 0.5 0 0.5 0.5 0) with n - 1 = 5: (4 x (1/6)^2 + 2 x (1/3)^2) / 5 = 1/15.
    half = 1.96 * (1 / 15) ** 0.5 / 6**0.5
    assert summary["interval"] == pytest.approx([1 / 3 - half, 1 / 3 + half])


def test_an_index_holds_unit_float16_features_and_no_pickle(run_directory: Path, index: Path) -> None:
    assert {name: tensor.dtype for name, tensor in load_file(index).items()} == {
        **{"features": torch.float16, "predictions": torch.int32, "images": torch.uint8},
    }
    catalogue = load_catalogue(index, open_trained(run_directory, "cpu"))
    assert torch.equal(catalogue.images, load_split("test", None, VAL_SIZE)[0][:4])
    assert catalogue.names == [f"below/{i}.png" for i in range(4)] and catalogue.labels.tolist() == [-1] * 4
    assert catalogue.features.shape == (4, 32)  # the small CNN's last width
    assert torch.allclose(catalogue.features.float().norm(dim=1), torch.ones(4), atol=2e-3)
    assert catalogue.run == "run" and catalogue.source == str(index.parent / "shop")


def test_an_index_of_40_000_classes_keeps_the_last_and_an_older_one_is_read(
    run_directory: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, path = open_trained(run_directory, "cpu"), tmp_path / "index.safetensors"
    made = features.compute_features(trained, load_split("test", None, VAL_SIZE)[0][:4])
    wanted = [0, 32_767, 32_768, 39_999]  # int16 ends at 32,767
    logits = F.one_hot(torch.tensor(wanted), 40_000).float()
    monkeypatch.setattr("fmnist.apps.search.catalogue.compute_features", lambda *_: replace(made, logits=logits))
    info = replace(trained.info, class_names=tuple(f"species {i}" for i in range(40_000)))
    many: Any = SimpleNamespace(info=info, class_names=info.class_names, name="run", digest=trained.digest)
    catalogue = folder_catalogue(many, index.parent / "shop")
    save_catalogue(catalogue, path, many)
    assert load_catalogue(path, many).predictions.tolist() == catalogue.predictions.tolist() == wanted
    # what an older version wrote: right up to 32,768 classes
    with safe_open(index, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(index)
    save_file(tensors | {"predictions": tensors["predictions"].short()}, path, metadata=about)
    assert torch.equal(load_catalogue(path, trained).predictions, tensors["predictions"])
    with pytest.raises(ValueError, match=r"is not an index of this version: its tensors are .*int16"):
        load_catalogue(path, many)


def test_query_by_split_and_by_file(run_directory: Path, tmp_path: Path) -> None:
    images, _, indices = load_indexed("val", None, VAL_SIZE)
    image, name = images[17].numpy(), f"val:{indices[17]}"
    Image.fromarray(image).save(tmp_path / "$odd_{name}.png")  # matplotlib would take it for a formula
    query = (name, "test:3", tmp_path / "$odd_{name}.png")
    options = ("--split", "val", "--k", 12, "--output", tmp_path / "out")
    done = search("query", run_directory, *query, *options)
    assert f"the 12 nearest of {VAL_SIZE} images to each picture" in done
    assert "search.csv, search.png\n" in done
    with Image.open(tmp_path / "out" / "search.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000
    rows = rows_of(tmp_path / "out" / "search.csv")
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 13)] * 3
    assert name not in [row["item"] for row in rows[:12]]  # the query itself does not count
    # As a file it is another picture, whose nearest is the one it was made from.
    assert rows[24]["item"] == name and float(rows[24]["similarity"]) == pytest.approx(1, abs=1e-3)
    labels = load("train")[1]
    assert all(row["class"] == CLASS_NAMES[labels[int(row["item"][4:])]] for row in rows)
    similarities = [float(row["similarity"]) for row in rows[:12]]
    assert similarities == sorted(similarities, reverse=True)
    found = json.loads(search("query", run_directory, *query, *options, "--json").splitlines()[0])
    assert [entry["item"] for entry in found] == [row["item"] for row in rows]


def test_a_split_needs_no_index_and_is_computed_once(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = NUM_TRAIN + NUM_TEST
    options = ("--split", "all", "--output", tmp_path)
    assert f"the 10 nearest of {everything:,} images" in search("query", run_directory, "test:0", *options)
    kept = {path.stem for path in (run_directory / "features").iterdir()}
    assert {"train", "val", "test"} <= kept
    monkeypatch.delattr(features, "compute_features")  # from here on it is read
    (tmp_path / "search.png").unlink()
    done = search("query", run_directory, "test:1", "test:2", *options, "--sheet", 1)
    assert "search.png of the first 1 queries" in done and len(rows_of(tmp_path / "search.csv")) == 20
    (tmp_path / "search.png").unlink()
    search("query", run_directory, "test:1", *options, "--sheet", 0)
    assert not (tmp_path / "search.png").exists()


def test_an_index_of_one_picture_has_nothing_to_find_for_it(run_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.fromarray(load_split("test", None, VAL_SIZE)[0][0].numpy()).save(tmp_path / "one" / "a.png")
    search("index", run_directory, "--folder", tmp_path / "one", "--output", tmp_path / "one.safetensors")
    args = ("query", run_directory, tmp_path / "one" / "a.png", "--index", tmp_path / "one.safetensors")
    said = search(*args, "--output", tmp_path / "out", status=2)
    assert "there is nothing to find: the index holds one picture" in said


def test_the_csv_is_there_where_the_sheet_fails(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmnist.apps.search.queries.plot_hits", fail)
    assert "No space left" in search("query", run_directory, "test:1", "--output", tmp_path, status=1)
    assert len(rows_of(tmp_path / "search.csv")) == 10


def test_captions_stay_in_their_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("fmnist.apps.search.hits.save_figure", lambda _, figure: drawn.append(figure))
    names = ("Ankle boot", "W" * 60, "Short-sleeved shirts of wool", "Bag")
    items = Catalogue(
        source="train", run="cnn", class_names=names, names=[f"train:{item}" for item in range(4)],
        images=torch.zeros(4, 28, 28, dtype=torch.uint8), features=torch.zeros(4, 2, dtype=torch.float16),
        labels=torch.arange(4), predictions=torch.arange(4, dtype=torch.int16),
    )  # fmt: skip
    hits = [
        Hit(
            query="pictures/emoji_hiking_boot.jpg", image=items.images[0], label=label, prediction=prediction,
            positions=torch.arange(4), similarities=torch.ones(4),
        )
        for label, prediction in ((UNKNOWN, 0), (UNKNOWN, 1), (2, 3))
    ]  # fmt: skip
    plot_hits(hits, items, tmp_path / "search.png")
    (figure,) = drawn
    cells = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert cells[0] == ["Ankle boot", "as predicted\n...king_boot.jpg"] and cells[1] == ["Ankle boot", "1.0000"]
    for row in range(3):  # each text lies in the figure, and beside that of the next cell
        boxes = [axes.texts[0].get_window_extent() for axes in figure.axes[5 * row : 5 * row + 5]]
        assert boxes[0].x0 >= 0 and boxes[-1].x1 <= figure.bbox.x1
        assert all(left.x1 + 3 <= right.x0 for left, right in itertools.pairwise(boxes))  # pixels
    assert cells[4][0] == "Bag" and "..." in cells[2][0] and "..." in cells[3][0]


def test_query_in_a_folder(run_directory: Path, index: Path, tmp_path: Path) -> None:
    picture = index.parent / "shop" / "below" / "2.png"
    search("query", run_directory, picture, "--index", index, "--output", tmp_path)
    rows = rows_of(tmp_path / "search.csv")
    assert {row["item"] for row in rows} == {f"below/{i}.png" for i in (0, 1, 3)}  # fewer than ten; not itself
    assert all(row["class"] == "" and row["predicted"] in CLASS_NAMES for row in rows)


def test_evaluate_prints_a_table_and_writes_json(run_directory: Path, tmp_path: Path) -> None:
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
    said = search("evaluate", run_directory, "--k", 3, "--output", out, "--json")
    assert json.loads(said.splitlines()[0]) == result
    # In its own place the next report finds it, as long as the weights are these.
    key = retrieval_key(open_trained(run_directory), None)
    kept = run_directory / "evaluation" / "test" / RETRIEVAL_FILE
    assert read_precision(kept, key) is None
    search("evaluate", run_directory, "--k", 3)
    assert read_precision(kept, key) == result
    assert read_precision(kept, key | {"train_sha256": "0" * 64}) is None  # of other images under the same name
    kept.write_text(out.read_text().replace(result["weights_sha256"], "0" * 64))
    assert read_precision(kept, key) is None


@pytest.mark.thorough
def test_a_report_measures_it_where_that_is_quick(run_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = open_trained(run_directory)
    trained = replace(trained, info=replace(trained.info, num_train=NUM_TRAIN - VAL_SIZE))
    with Compute() as compute:
        outcome = evaluate(trained, compute, Request())
    assert outcome is not None and outcome.cost is not None
    for without in (None, replace(outcome, split="val"), replace(outcome, cost=None)):
        assert retrieval_of(trained, without) is None
    # 1,500 training and 1,100 test images at one a second: 43 minutes.
    timing = replace(outcome.cost.timings[-1], images_per_second=1.0)
    slow = replace(outcome, cost=replace(outcome.cost, timings=(timing,)))
    with caplog.at_level(logging.INFO, "fmnist"):
        assert retrieval_of(trained, slow) is None
    assert "2,600 images take about 43 minutes here" in caplog.text
    assert f"fmnist search evaluate {run_directory}" in caplog.text
    result = retrieval_of(trained, outcome)
    assert result is not None and (result["k"], result["num_queries"]) == (10, NUM_TEST)
    # The run was never finished and has no summary.json: its page is written all the same.
    found = findings(replace(outcome, directory=run_directory / "page"), None, result)
    write_evaluation(found)
    assert found.metrics["retrieval"] == result
    text = (run_directory / "page" / "report.txt").read_text()
    assert (
        f"precision at 10, 1,100 test images among 1,500 training images: {100 * result['features']['mean']:.2f} %"
        in text
    )
    assert '<section id="retrieval">' in (run_directory / "page" / "report.html").read_text()


def test_an_index_of_other_weights_is_refused(index: Path, tmp_path: Path) -> None:
    other = untrained(tmp_path / "other", ModelConfig(name="mlp", options={"width": 32}), 28)
    done = search("query", other, "test:0", "--index", index, status=2)
    assert "was made by other weights (run, sha256" in done and "make it again: fmnist search index" in done


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("query", "RUN", "test:1100"), "test has images 0 to 1099"),
        (("query", "RUN", "nothing.png"), "nothing.png: no such file"),
        (("query", "RUN", "test:0", "--index", "nothing"), "--index: nothing: no such file or folder"),
        (("query", "RUN", "test:0", "--index", "README.md"), "is not an index of this version"),
        (("query", "RUN", "test:0", "--split", "tests"), "--split: invalid choice"),
        (("query", "RUN", "test:0", "--kk", 3), "unknown option --kk (did you mean --k?)"),
        (("query", "tests", "test:0"), "not a run directory"),
        (("index", "RUN", "--folder", "configs"), "a folder without pictures"),
        (("index", "RUN", "--folder", "README.md"), "is not a folder"),
        (("index", "RUN", "--folder", "nowhere"), "nowhere: no such file or folder"),
        (("evaluate", "RUN", "--k", 0), "valid range: 1 and more"),
    ],
)
def test_mistakes_are_one_line(args: tuple[object, ...], message: str, run_directory: Path) -> None:
    assert message in search(*(run_directory if arg == "RUN" else arg for arg in args), status=2)


def test_a_damaged_index_is_refused(run_directory: Path, index: Path, tmp_path: Path) -> None:
    trained = open_trained(run_directory, "cpu")
    catalogue, path = folder_catalogue(trained, index.parent / "shop"), tmp_path / "index.safetensors"
    for changes in (
        {"names": catalogue.names[:-1]},
        {"predictions": catalogue.predictions + 10},
        {"features": torch.full_like(catalogue.features, torch.nan)},
        {"features": catalogue.features.float()},
    ):
        save_catalogue(Catalogue(**(vars(catalogue) | changes)), path, trained)
        with pytest.raises(ValueError, match="is not an index of this version"):
            load_catalogue(path, trained)
    data = index.read_bytes()
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="is not an index of this version"):
            load_catalogue(path, trained)


def test_a_picture_that_points_the_other_way_finds_what_its_mirror_image_does(
    run_directory: Path, tmp_path: Path
) -> None:
    assert open_trained(run_directory).cfg.augment.flip  # it learned from mirrored images
    image = load_split("train", None, VAL_SIZE)[0][0]
    assert not torch.equal(image, image.flip(-1))
    for name, pixels in (("as_it_is", image), ("mirrored", image.flip(-1))):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    queries = [str(tmp_path / f"{name}.png") for name in ("as_it_is", "mirrored")]
    search("query", run_directory, *queries, "--k", 5, "--output", tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "search.csv")
    one, other = ([(row["item"], row["similarity"]) for row in rows if row["query"] == query] for query in queries)
    assert [item for item, _ in one] == [item for item, _ in other]
    assert [float(value) for _, value in one] == pytest.approx([float(value) for _, value in other], abs=2e-5)
    assert float(one[0][1]) == pytest.approx(1, abs=1e-3) and len({item for item, _ in one}) == 5  # itself is there


def test_a_file_that_cannot_be_read_is_named(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = ("query", str(run_directory), "test:0", *(f"missing_{i}.png" for i in range(7)), "--output", str(tmp_path))
    assert search_main(list(query)) == 1  # a path is not there
    said = capsys.readouterr()
    assert "; 7 not read" in said.out
    assert [f"missing_{i}.png: no such" in said.err.lower() for i in range(7)] == 5 * [True] + 2 * [False]
    assert search_main([*query, "--json"]) == 1 and "missing" not in capsys.readouterr().err
    (tmp_path / "broken.png").write_bytes(b"")
    broken = [*query[:3], str(tmp_path / "broken.png"), *query[-2:]]
    assert search_main(broken) == 0 and "broken.png: an empty file" in capsys.readouterr().err


def test_of_two_lists_the_nearer_of_each_item_is_kept() -> None:
    one = torch.tensor([[0.9, 0.5, 0.4]]), torch.tensor([[1, 2, 3]])
    other = torch.tensor([[0.8, 0.7, 0.6]]), torch.tensor([[2, 1, 4]])
    similarities, positions = nearer(one, other)
    assert positions.tolist() == [[1, 2, 4]] and similarities[0].tolist() == pytest.approx([0.9, 0.8, 0.6])
