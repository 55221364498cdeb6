"""The label audit: planted errors come first, decisions survive, and the page works in a real browser by hand."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from idx_files import TRAIN_LABELS, to_idx
from small import NUM_TRAIN, command, rows_of, write_small_data
from test_html_report import browse, console

import fmnist
from fmnist.apps.audit.__main__ import main as audit_main
from fmnist.apps.audit.table import HEADER
from fmnist.config.schema import DataConfig
from fmnist.data.corrections import read_decisions
from fmnist.data.fashion_mnist import CLASS_NAMES, load
from fmnist.data.split import Split
from fmnist.evaluation import suspects
from fmnist.evaluation.near_copies import NEAR_COPY, are_near_copies, find_pairs
from fmnist.evaluation.neighbours import Neighbours
from fmnist.evaluation.suspects import confident_joint, rank_labels, vote_shares

PLANTED = range(0, NUM_TRAIN, 40)  # 50 of 2,000
FOLDS = 2


def go(run: Path, data: dict[str, Any], **options: Any) -> Path:
    fmnist.train(
        ROOT / "configs" / "mlp.yaml",
        output_dir=str(run),
        data=data,
        batch={"global_batch_size": 50},
        evaluation={"test": False, "every_epochs": 8},
        log={"wandb": "disabled"},
        **({"schedule": {"epochs": 8, "warmup_epochs": 0.5}, "optim": {"lr": 0.002, "ema_decay": 0.0}} | options),
    )
    return run


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 training images, every fortieth of which has the label of the class five further on."""
    folder = write_small_data(tmp_path_factory.mktemp("planted"))
    labels = load("train")[1][:NUM_TRAIN].clone()
    labels[list(PLANTED)] = (labels[list(PLANTED)] + 5) % 10
    (folder / TRAIN_LABELS).write_bytes(to_idx((NUM_TRAIN,), labels.byte().numpy().tobytes()))
    return folder


@pytest.fixture(scope="module")
def run(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("one") / "run", {"root": str(planted), "val_size": 500})


@pytest.fixture(scope="module")
def folds(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("folds")
    data = {"root": str(planted), "folds": FOLDS}
    return [go(folder / f"fold{fold}", data | {"fold": fold}) for fold in range(FOLDS)]


def test_folds_that_trained_on_few_images_judge_all_that_they_held_out(planted: Path, tmp_path: Path) -> None:
    data, short = {"root": str(planted), "folds": 2, "limit": 200}, {"schedule": {"steps": 2, "warmup_epochs": 0.0}}
    runs = [go(tmp_path / f"fold{fold}", data | {"fold": fold}, **short) for fold in (0, 1)]
    command(audit_main, *runs, "--output", tmp_path / "all")
    assert sorted(int(row["index"]) for row in rows_of(tmp_path / "all" / "audit.csv")) == list(range(NUM_TRAIN))


def test_planted_errors_come_first_from_one_run(run: Path, planted: Path) -> None:
    said = command(audit_main, run, "--suspects", 60)
    rows = rows_of(run / "audit" / "audit.csv")
    assert list(rows[0]) == list(HEADER) and len(rows) == NUM_TRAIN
    assert "2,000 training images ranked" in said and "after deciding: " in said
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, NUM_TRAIN + 1)]
    labels = Split.load("train", DataConfig(root=str(planted), val_size=0)).labels
    train = set(Split.load("train", DataConfig(root=str(planted), val_size=500)).published.tolist())  # type: ignore[union-attr]
    assert {int(row["index"]) for row in rows} == set(range(NUM_TRAIN))
    for row in rows:
        assert row["label"] == CLASS_NAMES[labels[int(row["index"])]] != row["suggested"]
        assert row["split"] == ("train" if int(row["index"]) in train else "val")
        assert row["decision"] == "" and 0 <= float(row["own_probability"]) <= 1
    # 50 planted among 2,000: the first 100 would hold 2.5 by chance.
    assert sum(int(row["index"]) in PLANTED for row in rows[:100]) >= 35


@pytest.mark.thorough
def test_folds_judge_what_they_held_out(folds: list[Path], planted: Path, tmp_path: Path) -> None:
    said = command(audit_main, *folds, "--output", tmp_path / "all", "--suspects", 5)
    rows = rows_of(tmp_path / "all" / "audit.csv")
    assert "2 folds of 2 (fold0, fold1), each judging the images that it was not trained on" in said
    assert {row["split"] for row in rows} == {"train"} and len(rows) == NUM_TRAIN
    assert sum(int(row["index"]) in PLANTED for row in rows[:100]) >= 35
    # The probability is that of the run that held the image out, by hand.
    trained = fmnist.open_run(folds[1]).trained
    held = trained.split("val")
    probabilities = (
        trained.probabilities(trained(held.images)[0]) + trained.probabilities(trained(held.images.flip(-1))[0])
    ) / 2
    by_index = {int(row["index"]): row for row in rows}
    for position in range(0, len(held), 100):
        own = float(probabilities[position, held.labels[position]])
        assert float(by_index[held.position(position)]["own_probability"]) == pytest.approx(own, rel=1e-3)
    said = command(audit_main, folds[1], "--output", tmp_path / "half", "--suspects", 5)
    assert len(rows_of(tmp_path / "half" / "audit.csv")) == len(held) == 1000
    assert "1,000 training images of 2,000 in no fold that was given: not ranked" in said


@pytest.mark.thorough
def test_several_runs_are_averaged(run: Path, planted: Path, tmp_path: Path) -> None:
    other = go(tmp_path / "other", {"root": str(planted), "val_size": 500}, seed=1)
    said = command(audit_main, run, other, "--output", tmp_path / "both", "--suspects", 5)
    assert "2 runs, averaged (run, other), trained on these very labels" in said
    by_index = {int(row["index"]): row for row in rows_of(tmp_path / "both" / "audit.csv")}
    both = [fmnist.open_run(path).trained for path in (run, other)]
    for name in ("train", "val"):
        split = both[0].split(name)  # type: ignore[arg-type]
        views = (split.images[::60], split.images[::60].flip(-1))
        mean = torch.stack([each.probabilities(each(view)[0]) for each in both for view in views]).mean(dim=0)
        for row, position in enumerate(range(0, len(split), 60)):
            own = float(mean[row, split.labels[position]])
            assert float(by_index[split.position(position)]["own_probability"]) == pytest.approx(own, rel=1e-3)


@pytest.mark.thorough
def test_runs_that_do_not_belong_together_are_refused(
    run: Path, folds: list[Path], planted: Path, tmp_path: Path
) -> None:
    said = command(audit_main, run, folds[0], "--output", tmp_path, status=2)
    assert "different data.folds (run: none, fold0: 2); valid: folds of one deal" in said
    (tmp_path / "other").mkdir()
    other = write_small_data(tmp_path / "other")  # the same images with their true labels
    said = command(audit_main, folds[0], "--data.root", other, "--output", tmp_path / "out", status=2)
    assert "fold0 was trained on other images or labels than those that are there now" in said
    second = go(
        tmp_path / "second", {"root": str(planted), "val_size": 300}, schedule={"steps": 2, "warmup_epochs": 0.0}
    )
    said = command(audit_main, run, second, "--output", tmp_path / "out", status=2)
    assert "run and second" in said and "different" in said
    assert not (tmp_path / "out").exists()
    assert "--output is" in command(audit_main, run, "--output", tmp_path / "a.csv", status=2)


def test_decisions_survive_the_next_audit_and_foreign_files_stay(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "audit"
    command(audit_main, run, "--output", output, "--suspects", 3)
    rows = rows_of(output / "audit.csv")
    rows[0]["decision"], rows[0]["suggested"] = (
        "relabel",
        next(name for name in CLASS_NAMES if name not in (rows[0]["label"], rows[0]["suggested"])),
    )
    rows[1]["decision"], rows[500]["decision"] = "drop", "keep"
    write(output / "audit.csv", rows)
    assert "3 decisions kept" in command(audit_main, run, "--output", output, "--suspects", 3)
    assert rows_of(output / "audit.csv") == rows
    decisions = [row for row in read_decisions(output / "audit.csv", CLASS_NAMES) if row.decision]
    assert [(row.line, row.decision) for row in decisions] == [(2, "relabel"), (3, "drop"), (502, "keep")]

    before = (output / "audit.csv").read_bytes()
    rows[1]["decision"] = "remove"
    write(output / "audit.csv", rows)
    said = command(audit_main, run, "--output", output, status=2)
    assert (
        "audit.csv line 3: decision is 'remove'" in said
        and "decisions would be lost: mend it, move it, or --force" in said
    )
    rows[1] |= {"decision": "drop", "split": "test"}  # no image that is ranked
    write(output / "audit.csv", rows)
    said = command(audit_main, run, "--output", output, status=2)
    assert (
        f"audit.csv line 3: test:{rows[1]['index']}, so labelled, is not ranked here; decisions would be lost" in said
    )
    (output / "audit.csv").write_text("my notes")
    said = command(audit_main, run, "--output", output, status=2)
    assert "audit.csv was not made by this command" in said and (output / "audit.csv").read_text() == "my notes"
    command(audit_main, run, "--output", output, "--suspects", 3, "--force")
    assert (output / "audit.csv").read_bytes().count(b"\n") == before.count(b"\n")
    for name in ("features", "checkpoints"):
        assert "is a file of the run" in command(audit_main, run, "--output", run / name, status=2)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


CPU = torch.device("cpu")


def noise(number: int) -> torch.Tensor:
    """Images of which none resembles another."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 8, 8), generator=generator, dtype=torch.uint8)


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def test_ranks_by_hand() -> None:
    probabilities = torch.tensor(
        [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.02, 0.50, 0.48], [0.0, 1.0, 0.0]], dtype=torch.float64
    )
    labels = torch.tensor([0, 0, 0, 0])
    found = rank_labels(probabilities, labels, noise(4), on_circle(0, 90, 180, 270), CPU)
    # All vote for class 0, three times: 0.5 / 0.3, 0.1 / 0.8, 0.02 / 0.50 and 0, each times 10 ** 0.5.
    assert found.order.tolist() == [3, 2, 1, 0]
    assert found.suggested.tolist() == [1, 1, 1, 1] and found.own.tolist() == [0.5, 0.1, 0.02, 0.0]
    alone = rank_labels(probabilities[:1], labels[:1], noise(1), on_circle(0), CPU)
    assert alone.order.tolist() == [0]


def test_votes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two votes: of the nearest, neither oneself nor a near copy, and a third that all classes share."""
    images = noise(6)
    images[1] = (images[0].float() * 0.9).byte()
    features = on_circle(0, 1, 10, 30, 100, 180)
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    votes = vote_shares(torch.tensor([0, 3, 5]), labels, images, features, Neighbours(features, CPU), 3, voters=2)
    # 0 leaves its copy 1 out: 2 and 3. 3 asks 2 and 1 (20 and 29 degrees away), 5 asks 4 and 3.
    thirds = torch.tensor([[1, 4, 4], [4, 4, 1], [1, 1, 7]]) / 9
    assert torch.allclose(votes, thirds.double(), atol=1e-7)
    only = vote_shares(
        torch.tensor([0]), labels[:2], images[:2], features[:2], Neighbours(features[:2], CPU), 3, voters=2
    )
    assert only.tolist() == [[1 / 3, 1 / 3, 1 / 3]]  # nobody votes but its copy

    # Two labels that the model doubts alike: the one that its neighbours contradict comes first.
    features, labels = on_circle(0, 1, 2, 90, 91, 92), torch.tensor([0, 1, 1, 0, 0, 0])
    probabilities = torch.tensor([[0.2, 0.8]] + [[0.1, 0.9]] * 2 + [[0.19, 0.81]] + [[0.9, 0.1]] * 2).double()

    def ranked(**options: float) -> list[int]:
        return rank_labels(probabilities, labels, noise(6), features, CPU, voters=2, **options).order.tolist()  # type: ignore[arg-type]

    # Of two classes both voters and half a vote are 5/6, the other half 1/6: 0.25 / 5 ** 0.5 = 0.11,
    # 0.235 * 5 ** 0.5 = 0.52.
    assert ranked()[:2] == [0, 3]
    assert ranked(weight=0)[:2] == [3, 0]
    monkeypatch.setattr(suspects, "FEWEST", 1)  # what is not voted on comes after, by the model alone
    assert ranked()[:2] == [3, 0]
    monkeypatch.setattr(suspects, "FEWEST", 2)
    assert ranked()[:2] == [0, 3]
    # Both are right by the model, which speaks of no other image: they are voted on, and no other in their place.
    probabilities = torch.tensor([[0.6, 0.4], [0, 0], [0, 0], [0.7, 0.3], [0, 0], [0, 0]]).double()
    assert ranked()[:2] == [0, 3]


def test_the_confident_joint_by_hand() -> None:
    # mean own probability: class 0 of (0.9, 0.4, 0.5) = 0.6, class 1 of (0.6, 0.8) = 0.7, class 2 has no image
    probabilities = torch.tensor([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.5, 0.5, 0], [0.4, 0.6, 0], [0.2, 0.8, 0]]).double()
    probabilities[1] = torch.tensor([0.2, 0.8, 0.0])  # 0.9, 0.2, 0.5: 0.5333
    joint = confident_joint(probabilities, torch.tensor([0, 0, 0, 1, 1]))
    # first: 0.9 >= 0.5333; second: 0.8 >= 0.7 is class 1; third and fourth reach neither; fifth: 0.8 >= 0.7
    assert joint.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("shape", [(9, 9), (3, 9, 9), (3, 60, 50)])  # the last are compared at 48 px
def test_the_copies_that_do_not_vote_are_the_pairs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (80, *shape), generator=generator, dtype=torch.uint8)
    images[40], images[3] = images[7], (images[60].float() * 0.9).byte()
    images[5], images[6] = 9, 9  # constant: they resemble none, each other neither
    everyone = torch.arange(80)
    copies = are_near_copies(images, everyone, everyone.repeat(80, 1))
    pairs = {(a, b) for a, b in copies.nonzero().tolist() if a < b}
    assert pairs == {(a, b) for a, b in find_pairs(images, NEAR_COPY)[0].tolist()} == {(7, 40), (3, 60)}
    assert torch.equal(copies, copies.T)


@pytest.mark.parametrize("shape", [(9, 9), (3, 9, 9)])
def test_pairs_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, *shape), generator=generator, dtype=torch.uint8)
    images[40] = images[7]
    images[59] = (images[12].float() * 0.9).byte()
    images[20] = 5  # constant: it resembles none
    pairs, correlations = find_pairs(images, 0.3)
    exact = np.nan_to_num(np.corrcoef(images.flatten(1).double().numpy()))
    expected = {(a, b) for a in range(60) for b in range(a + 1, 60) if exact[a, b] > 0.3}
    assert {tuple(pair) for pair in pairs.tolist()} == expected and {(7, 40), (12, 59)} <= expected
    assert correlations.tolist() == sorted(correlations.tolist(), reverse=True)
    for (a, b), value in zip(pairs.tolist(), correlations.tolist(), strict=True):
        assert value == pytest.approx(exact[a, b], abs=1e-9)
    assert find_pairs(images[:1])[0].shape == (0, 2)


@pytest.mark.thorough
def test_pairs_of_the_real_images_are_the_89_and_the_682() -> None:
    images = torch.cat((load("train")[0], load("test")[0]))
    pairs, correlations = find_pairs(images)
    across = (pairs[:, 0] < 60_000) & (pairs[:, 1] >= 60_000)
    for threshold, number in ((0.99, 89), (0.98, 682)):  # those of test_near_copies.py
        assert len(pairs[across & (correlations > threshold)][:, 1].unique()) == number


def test_colours_and_classes_of_ones_own(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = np.array(['=cmd()|"x"', "a, b", "<script>alert(1)</script>"])
    labels = np.arange(90) % 3
    images = (generator.integers(0, 60, (90, 40, 36, 3)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    images[88], labels[88] = images[0], 1  # a copy that contradicts: 88 % 3 = 1, and image 0 is of class 0
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels, class_names=names,
             test_images=images[:6], test_labels=labels[:6])  # fmt: skip
    data = {"name": "npz", "root": str(tmp_path / "set.npz"), "val_size": 12}
    run = go(tmp_path / "run", data, schedule={"steps": 4, "warmup_epochs": 0.0}, augment={"size": 32})
    command(audit_main, run)
    rows = rows_of(run / "audit" / "audit.csv")
    assert len(rows) == 90 and rows[0]["label"] in {'\'=cmd()|"x"', "a, b", names[2]}
    page = (run / "audit/audit.html").read_text()
    assert "<script>alert" not in page and "data:image/jpeg" in page
    assert "between test and train" in page and "Similar, with different labels" in page
    rows[4]["decision"] = "drop"
    write(run / "audit/audit.csv", rows)
    split = Split.load("train", DataConfig(**data, corrections=str(run / "audit/audit.csv")))
    assert len(split) == 78 - (rows[4]["split"] == "train")


# What somebody types and clicks, with what the page then shows.
SCRIPT = """<script>
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const cards2 = [...document.querySelectorAll(".card")];
const said = { start: document.getElementById("decided").textContent };
if (said.start === "0") {
  press("ArrowRight"); press("k"); press("r"); press("d"); press("ArrowLeft"); press("u");
  said.at = cards2.indexOf(document.activeElement);
  cards2[5].querySelector("[data-do=drop]").click();
  cards2[6].querySelector("[data-do=keep]").click(); cards2[6].querySelector("[data-do=keep]").click();
  const select = cards2[7].querySelector("select");
  select.dispatchEvent(new Event("focus")); said.options = [...select.options].map(option => option.text);
  select.value = [...select.options].at(-1).value; select.dispatchEvent(new Event("change"));
}
said.tally = document.getElementById("tally").textContent;
said.csv = csv();
said.widths = [document.documentElement.scrollWidth, innerWidth];
const lines = node => {
  const range = new Range();
  range.selectNodeContents(node);
  return range.getClientRects().length;
};
said.captions = [...document.querySelectorAll(".near figcaption")].map(node => [node.textContent, lines(node)]);
said.menus = cards2.map(card => card.querySelector("select").offsetWidth / card.offsetWidth);
document.documentElement.dataset.said = encodeURIComponent(JSON.stringify(said));
</script></body>"""


@pytest.mark.thorough
def test_the_page_is_decided_by_hand_and_remembers(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "audit"
    command(audit_main, run, "--output", output, "--suspects", 20)
    rows = rows_of(output / "audit.csv")
    rows[30]["decision"] = "drop"  # not on the page
    write(output / "audit.csv", rows)
    command(audit_main, run, "--output", output, "--suspects", 20)
    text = (output / "audit.html").read_text()
    assert "http" not in text.replace("http-equiv", "") and text.count('class="card"') == 20
    assert (output / "audit.html").stat().st_size < 15_000_000
    page = tmp_path / "driven.html"
    page.write_text(text.replace("</body>", SCRIPT))

    def drive(width: int) -> dict[str, Any]:
        flags = (f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom")
        done = browse(*flags, page.as_uri())
        assert not [line for line in console(done) if "ERROR" in line or "Uncaught" in line or "Refused" in line]
        found = re.search(rb'data-said="([^"]*)"', done.stdout)
        assert found is not None
        from urllib.parse import unquote

        return json.loads(unquote(found[1].decode()))

    first = drive(1280)
    assert first["start"] == "0"
    # Right: the first card. k, r, d decide cards 0, 1, 2, each moving on to the next; left: card 2; u undoes it there.
    assert first["at"] == 2 and first["tally"] == "1 kept, 2 relabelled, 1 dropped"
    assert sorted(first["options"]) == sorted(set(CLASS_NAMES) - {rows[7]["label"]})
    assert first["widths"][0] <= first["widths"][1]
    (tmp_path / "decisions.csv").write_text(first["csv"])
    decided = [row for row in read_decisions(tmp_path / "decisions.csv", CLASS_NAMES) if row.decision]
    expected = {0: "keep", 1: "relabel", 5: "drop", 7: "relabel", 30: "drop"}
    assert {(row.split, row.index, row.decision) for row in decided} == {
        (rows[place]["split"], int(rows[place]["index"]), word) for place, word in expected.items()
    }
    chosen = next(row for row in decided if row.index == int(rows[7]["index"]))
    assert CLASS_NAMES[chosen.suggested or 0] == first["options"][-1]
    again = drive(400)  # the same browser, a phone's width
    assert again["start"] == "4" and again["tally"] == first["tally"] and again["csv"] == first["csv"]
    assert again["widths"][0] <= again["widths"][1]
    assert len(again["captions"]) == 60 and {name for name, _ in again["captions"]} <= set(CLASS_NAMES)
    assert [name for name, lines in again["captions"] if lines > len(name.split())] == []  # no word is cut
    assert min(again["menus"]) > 0.8
