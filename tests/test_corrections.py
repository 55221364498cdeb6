"""Decisions about labels and folds: what a file of them may hold, what they change, and that a run stands by them."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from conftest import warm_train as train
from idx_files import write_small

import fmnist
from fmnist.checkpoint.fingerprint import CORRECTIONS, IMAGES, kept_fingerprint
from fmnist.config.conflicts import validate
from fmnist.config.schema import Config, DataConfig
from fmnist.data.corrections import DROPPED, Corrections
from fmnist.data.folds import fold_of
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.runtime.files import csv_bytes, read_csv
from fmnist.trained import open_trained

FOLDS_OF_20 = [1, 0, 2, 2, 3, 2, 1, 3, 2, 1, 0, 1, 4, 4, 4, 4, 0, 3, 3, 0]
VAL_DIGEST = "585d3e1b81975036"
HEADER = "rank,split,index,label,suggested,own_probability,decision\n"


@pytest.fixture
def small(tmp_path: Path) -> str:
    """20 training images, label i modulo 10, and 10 test images."""
    return str(write_small(tmp_path / "data"))


def corrected(root: str, rows: str, tmp_path: Path, header: str = HEADER, **data: Any) -> dict[str, Split]:
    """Load the splits with a file of these rows."""
    (tmp_path / "audit.csv").write_bytes((header + rows).encode())
    options = {"root": root, "val_size": 10, "corrections": str(tmp_path / "audit.csv")} | data
    source = open_source(DataConfig(**options))
    return {name: Split.load(name, source) for name in ("train", "val", "test")}  # type: ignore[arg-type]


def by_index(split: Split, labels: torch.Tensor | None = None) -> dict[int, int]:
    assert split.published is not None
    return dict(zip(split.published.tolist(), (split.labels if labels is None else labels).tolist(), strict=True))


@pytest.mark.parametrize(
    ("class_sizes", "folds", "expected"),
    [
        ([6_000] * 10, 5, [12_000] * 5),
        ([7, 3, 1], 2, [6, 5]),  # 11 images
        ([4, 0, 4], 3, [3, 3, 2]),  # an absent class
        ([1, 1, 1], 3, [1, 1, 1]),
    ],
)
def test_folds_partition_the_images_each_class_evenly(class_sizes: list[int], folds: int, expected: list[int]) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(class_sizes)])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = fold_of(labels, folds)
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not move"
    assert found.bincount(minlength=folds).tolist() == expected
    for label in labels.unique():
        counts = found[labels == label].bincount(minlength=folds)
        assert counts.max() - counts.min() <= 1
    torch.manual_seed(2)
    assert torch.equal(fold_of(labels, folds), found)


def test_the_folds_of_every_run_ever_are_these() -> None:
    # A change here would call images held out that an older run was trained on.
    assert fold_of(torch.arange(20) % 4, 5).tolist() == FOLDS_OF_20


def test_a_fold_takes_the_place_of_the_validation_images(small: str) -> None:
    held: list[int] = []
    for fold in range(5):
        cfg = DataConfig(root=small, val_size=10, folds=5, fold=fold)  # val_size has no effect
        splits = {name: Split.load(name, cfg) for name in ("train", "val", "test")}  # type: ignore[arg-type]
        assert [len(split) for split in splits.values()] == [16, 4, 10]
        for split in (splits["train"], splits["val"]):
            assert (split.images[:, 0, 0] % 10 == split.labels).all(), "images and labels must stay together"
            assert by_index(split).keys() == {*split.images[:, 0, 0].tolist()}
        assert sorted(by_index(splits["train"]) | by_index(splits["val"])) == list(range(20))
        held += by_index(splits["val"])
    assert sorted(held) == list(range(20))
    with pytest.raises(ValueError, match=r"data\.folds is 21; valid: at most the 20 training images$"):
        Split.load("val", DataConfig(root=small, folds=21, fold=0))


def test_a_data_set_with_its_own_validation_images_deals_its_training_images_only(tmp_path: Path) -> None:
    images = np.arange(30, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    labels = np.arange(30) % 2
    path = tmp_path / "set.npz"
    np.savez(path, train_images=images[:20], train_labels=labels[:20], val_images=images[20:], val_labels=labels[20:])
    cfg = DataConfig(name="npz", root=str(path), folds=2, fold=1)
    train_split, val_split = Split.load("train", cfg), Split.load("val", cfg)
    assert sorted([*by_index(train_split), *by_index(val_split)]) == list(range(20))
    assert int(val_split.images.max()) < 20
    # Position 5 of val is another image than position 5 of train.
    rows = "1,val,5,1,0,0.1,relabel\n2,train,4,0,1,0.1,drop\n"
    splits = corrected(str(path), rows, tmp_path, name="npz")
    assert splits["val"].corrected is not None and by_index(splits["val"], splits["val"].corrected)[5] == 0
    assert by_index(splits["train"])[5] == 1 and 4 not in by_index(splits["train"])
    with pytest.raises(ValueError, match="line 2: there is no image 15 in val$"):
        corrected(str(path), "1,val,15,1,0,0.1,relabel\n", tmp_path, name="npz")
    # What `fmnist audit` writes of folds says train of every image, of those held out too; its own val is aside.
    rows = "".join(f"{i + 1},train,{i},{i % 2},{1 - i % 2},0.1,{'relabel' if i in (3, 6) else ''}\n" for i in range(20))
    for fold in (0, 1):
        splits = corrected(str(path), rows, tmp_path, name="npz", folds=2, fold=fold)
        both = {**by_index(splits["train"]), **by_index(splits["val"], splits["val"].corrected)}
        assert both == {i: 1 - i % 2 if i in (3, 6) else i % 2 for i in range(20)}
    with pytest.raises(ValueError, match="line 2: there is no image 5 in val$"):
        corrected(str(path), "1,val,5,1,0,0.1,relabel\n", tmp_path, name="npz", folds=2, fold=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fold": 1}, "data.fold 1 has no effect: data.folds is null"),
        ({"folds": 5}, "data.fold is null; valid with data.folds 5: 0 to 4"),
        ({"folds": 5, "fold": 5}, "data.fold is 5; valid with data.folds 5: 0 to 4"),
        ({"folds": 1, "fold": 0}, "data.folds is 1; valid range: 2 to 1000"),
    ],
)
def test_a_fold_needs_its_count(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validate(replace(Config(), data=DataConfig(**options)))


def test_decisions_change_the_training_images_and_leave_the_others_labels_as_given(tmp_path: Path) -> None:
    small = str(write_small(tmp_path / "sixty", num_train=60))
    plain = {name: Split.load(name, DataConfig(root=small, val_size=10)) for name in ("train", "val", "test")}  # type: ignore[arg-type]
    first, second, third = sorted(by_index(plain["train"]))[:3]
    held = min(by_index(plain["val"]))
    name = plain["train"].class_names
    rows = [
        (1, "train", first, name[first % 10], name[7], 0.1, "relabel"),
        (2, "val", second, name[second % 10], "", 0.1, "Drop "),  # of another val_size; as people type
        (3, "train", third, name[third % 10], name[1], 0.1, "keep"),
        (4, "train", held, name[held % 10], name[8], 0.1, "relabel"),
        (5, "test", 0, name[0], name[9], 0.1, "drop"),
        (6, "train", third, name[third % 10], name[1], 0.1, ""),  # says nothing, and contradicts nothing
    ]
    splits = corrected(small, csv_bytes(HEADER.strip().split(","), rows).decode().partition("\n")[2], tmp_path)
    expected = by_index(plain["train"]) | {first: 7}
    del expected[second]
    assert by_index(splits["train"]) == expected
    assert (splits["train"].images[:, 0, 0].long() == splits["train"].published).all()
    for split in ("val", "test"):
        assert torch.equal(splits[split].labels, plain[split].labels), "accuracy is counted on the labels as given"
    assert splits["val"].corrected is not None and splits["test"].corrected is not None
    assert by_index(splits["val"], splits["val"].corrected) == by_index(plain["val"]) | {held: 8}
    assert by_index(splits["test"], splits["test"].corrected) == by_index(plain["test"]) | {0: DROPPED}
    assert plain["val"].corrected is None and plain["val"].corrections_sha256 == "none"
    # A fold is dealt before anything is corrected: its images are the same ones.
    folds = corrected(small, (tmp_path / "audit.csv").read_text().partition("\n")[2], tmp_path, folds=2, fold=0)
    assert by_index(folds["val"]).keys() == by_index(Split.load("val", DataConfig(root=small, folds=2, fold=0))).keys()


GOOD = "1,train,0,T-shirt/top,Shirt,0.1,relabel\n"
BAD: dict[str, tuple[str, str]] = {
    "decision": ("1,train,0,T-shirt/top,Shirt,0.1,rm\n", "decision is 'rm'; valid: keep, relabel, drop, or empty"),
    "split": ("1,dev,0,T-shirt/top,Shirt,0.1,drop\n", "line 2: split is 'dev'; valid: train, val, test"),
    "index": (GOOD + "2,train,1.0,Trouser,Shirt,0.1,drop\n", "line 3: index is '1.0'; valid: a position"),
    "huge index": ("2,train," + 40 * "9" + ",Trouser,Shirt,0.1,drop\n", "line 2: index is '999"),
    "negative": ("2,train,-1,Trouser,Shirt,0.1,drop\n", "line 2: index is '-1'"),
    "other digits": ("2,train,\u0661,Trouser,Shirt,0.1,drop\n", "line 2: index is"),
    "beyond": ("2,train,20,Trouser,Shirt,0.1,drop\n", "line 2: there is no image 20 in train"),
    "beyond test": ("2,test,10,Trouser,Shirt,0.1,drop\n", "line 2: there is no image 10 in test"),
    "label": ("2,train,1,Trousers,Shirt,0.1,drop\n", "line 2: label is 'Trousers'; valid: T-shirt/top, Trouser, "),
    "suggested": ("2,train,1,Trouser,Hat,0.1,keep\n", "line 2: suggested is 'Hat'; valid: T-shirt/top"),
    "no suggestion": ("2,train,1,Trouser,,0.1,relabel\n", "relabel, but suggested is empty; valid: another"),
    "itself": ("2,train,1,Trouser,Trouser,0.1,relabel\n", "but suggested is the label itself; valid: another class"),
    "other data": ("2,train,1,Dress,Shirt,0.1,\n", "label is 'Dress', but image 1 of train is 'Trouser' here"),
    "contradiction": (GOOD + "2,train,0,T-shirt/top,,0.1,drop\n", "line 3: image 0 is decided otherwise in line 2"),
    "other class": (GOOD + "2,val,0,T-shirt/top,Dress,0.1,relabel\n", "line 3: image 0 is decided otherwise in line 2"),
    "cells": ("1,train,0\n", "line 2: 3 cells, expected 7"),
    "class lost": (GOOD + "2,train,10,T-shirt/top,,0.1,drop\n", "leaves no training image of class 'T-shirt/top'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_line_that_names_it(name: str, small: str, tmp_path: Path) -> None:
    rows, words = BAD[name]
    with pytest.raises(ValueError) as error:
        corrected(small, rows, tmp_path, val_size=0)
    said = str(error.value)
    assert said.startswith(f"data.corrections: {tmp_path}/audit.csv") and words in said and "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no column split; expected split, index, label, suggested, decision"),
        (b"split,index,label,suggested\n", "has no column decision"),
        (b"split,split,index,label,suggested,decision\n", "has no column split"),
        (b"\xff\xfe\x00s", "is no CSV file in UTF-8"),
        (HEADER.encode() + b'1,train,0,"T-shirt' + 200_000 * b"x", "line 2: "),
        (None, "file.csv; if it was moved, give its new place: --data.corrections FILE"),
    ],
)
def test_what_is_no_file_of_decisions(content: bytes | None, words: str, small: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "file.csv").write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_source(DataConfig(root=small, val_size=0, corrections=str(tmp_path / "file.csv")))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffindex,decision\r\n5,drop\r\n\r\n7,\r\n",  # a byte order mark, its line ends, an empty line
        "decision;index\ndrop;5\n;7\n",
        '"index","decision"\n"5","drop"\n7,""\n,\n',
    ],
)
def test_a_spreadsheet_may_have_saved_it(content: str, tmp_path: Path) -> None:
    (tmp_path / "saved.csv").write_bytes(content.encode())
    rows = [row for _, row in read_csv(tmp_path / "saved.csv", ("index", "decision"))]
    assert [(row["index"], row["decision"]) for row in rows] == [("5", "drop"), ("7", "")]


def test_names_that_a_spreadsheet_would_run_come_back(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    names = ["=1+1", " a, b ", "-x"]
    np.savez(
        path,
        train_images=np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8),
        train_labels=np.arange(6) % 3,
        class_names=np.array(names),
    )
    rows = csv_bytes(HEADER.strip().split(","), [(1, "train", 0, "=1+1", " a, b ", 0.1, "relabel")]).decode()
    assert "'=1+1" in rows
    splits = corrected(str(path), rows.partition("\n")[2], tmp_path, name="npz", val_size=0)
    assert by_index(splits["train"])[0] == 1


def test_the_digest_is_of_what_changes() -> None:
    one = Corrections({"train": {3: 1, 5: DROPPED}, "val": {}})
    assert one.sha256 == Corrections({"val": {}, "train": {5: DROPPED, 3: 1}}).sha256
    for other in ({"train": {3: 2, 5: DROPPED}}, {"train": {3: 1}}, {"val": {3: 1, 5: DROPPED}}):
        assert Corrections(other).sha256 != one.sha256


def test_without_these_options_a_split_is_what_it_was(real_folder: Path) -> None:
    # As computed before the options were there.
    assert Split.load("val", DataConfig(root=str(real_folder))).digest.startswith(VAL_DIGEST)


def go(run: Path, root: Path, **data: Any) -> fmnist.RunResults:
    return fmnist.train(
        ROOT / "configs" / "mlp.yaml",
        output_dir=str(run),
        data={"root": str(root), "val_size": 500} | data,
        batch={"global_batch_size": 100},
        schedule={"steps": 4, "warmup_epochs": 0.0},
        checkpoint={"every_steps": 2},
        log={"wandb": "disabled"},
    )


def test_a_run_stands_by_its_corrections(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = {name: Split.load(name, DataConfig(root=str(data), val_size=500)) for name in ("train", "val", "test")}  # type: ignore[arg-type]
    names = splits["train"].class_names
    rows = []
    for name, number in (("train", 3), ("val", 20), ("test", 10)):
        for position in range(number):
            label = int(splits[name].labels[position])
            row = (1, name, splits[name].position(position), names[label], names[(label + 1) % 10], 0.1)
            rows.append((*row, "drop" if position % 2 else "relabel"))
    file = tmp_path / "decisions.csv"
    file.write_bytes(csv_bytes(HEADER.strip().split(","), rows))
    run = go(tmp_path / "run", data, corrections=str(file))
    assert json.loads((tmp_path / "run/data.json").read_text())["num_train"] == 1500 - 1  # of 3, the second is dropped
    summary, kept = run.summary, kept_fingerprint(tmp_path / "run")
    given = run.evaluate("test")
    assert summary["test.top1"] == given["top1"] and given["num_images"] == 1100
    # By hand: relabelled images count with their new label, dropped ones do not.
    logits, _ = run.trained(splits["test"].images)
    labels = splits["test"].labels.clone()
    labels[0:10:2] = (labels[0:10:2] + 1) % 10
    kept_images = torch.ones(1100, dtype=torch.bool)
    kept_images[1:10:2] = False
    expected = (logits.argmax(1) == labels)[kept_images].double().mean()
    assert summary["test.top1_corrected"] == pytest.approx(float(expected), abs=1e-12)
    assert summary["test.num_corrected"] == 10 and summary["val.num_corrected"] == 20
    assert "after data.corrections (10 labels changed or dropped)" in (tmp_path / "run/train.log").read_text()

    # The same decisions in another order, with what changes nothing, under another name: the same run.
    more = [*rows[::-1], (9, "train", splits["train"].position(9), names[splits["train"].labels[9]], "", 0.1, "keep")]
    (tmp_path / "moved.csv").write_bytes(csv_bytes(HEADER.strip().split(","), more))
    go(tmp_path / "run", data, corrections=str(tmp_path / "moved.csv"))
    # Others, or none, are refused by name.
    file.write_bytes(csv_bytes(HEADER.strip().split(","), rows[1:]))
    for options in ({"corrections": str(file)}, {}):
        with pytest.raises(ValueError, match=r"data\.corrections was sha256 [0-9a-f]{12}, now ") as error:
            go(tmp_path / "run", data, **options)
        assert "\n" not in str(error.value)
    # Where the file has gone, the run is used still: what is given to val and test never depends on it.
    file.unlink()
    gone = open_trained(tmp_path / "run", "cpu")
    with caplog.at_level(logging.WARNING, logger="fmnist"):
        assert torch.equal(gone.split("test").images, splits["test"].images)
        assert len(gone.split("train")) == 1500
    said = [line for line in caplog.messages if "is gone: labels are used as given" in line]
    assert len(said) == 1 and "holds other training images or labels than run was made with" in caplog.text
    plain = go(tmp_path / "plain", data)
    before = kept_fingerprint(tmp_path / "plain")
    assert before[CORRECTIONS] == "none" != kept[CORRECTIONS]
    assert before[IMAGES["train"]] != kept[IMAGES["train"]] and before[IMAGES["test"]] == kept[IMAGES["test"]]
    assert not {name for name in plain.summary if "corrected" in name}


@pytest.mark.thorough
def test_two_processes_hold_out_the_same_fold(data: Path, tmp_path: Path) -> None:
    flags = ("--config", ROOT / "configs/mlp.yaml", "--data.root", data, "--data.folds", 3, "--data.fold", 2,
             "--schedule.steps", 2, "--schedule.warmup_epochs", 0, "--batch.global_batch_size", 100,
             "--log.wandb", "disabled", "--evaluation.test", "false")  # fmt: skip
    for processes in (1, 2):
        train(*flags, "--output_dir", tmp_path / f"run{processes}", processes=processes)
    one, two = (kept_fingerprint(tmp_path / f"run{processes}") for processes in (1, 2))
    assert one == two
    val = Split.load("val", DataConfig(root=str(data), folds=3, fold=2))
    assert one[IMAGES["val"]] == val.digest and len(val) in (666, 667)  # 2,000 / 3


def test_a_file_that_is_not_there_is_said_before_torch_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    from fmnist.config.parse import parse_config

    with pytest.raises(SystemExit):
        parse_config(["--data.corrections", "absent.csv", "--output_dir", "runs/absent_here"])
    assert "data.corrections: there is no file absent.csv" in capsys.readouterr().err
