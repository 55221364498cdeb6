"""Comparison of runs: McNemar, Pareto front, seeds and table, by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from fmnist.config.schema import Config, OptimConfig
from fmnist.data.fashion_mnist import INFO
from fmnist.evaluation.cost import Cost, Timing, sum_of_costs
from fmnist.evaluation.numbers import summarize
from fmnist.evaluation.outcome import Outcome, ensemble
from fmnist.evaluation.ranking import check_comparable, comparison_rows, mcnemar, pareto_front, told_apart
from fmnist.evaluation.seeds import repeated_seeds, seed_groups, unequal_lengths
from fmnist.report.comparison import comparison_table
from fmnist.report.comparison import write_comparison as write_rows
from fmnist.report.comparison_figure import plot_comparison
from fmnist.trained import Trained

NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def right(*counts: tuple[int, bool]) -> torch.Tensor:
    return torch.cat([torch.full((count,), value) for count, value in counts])


def test_mcnemar_by_hand() -> None:
    # 10 both, 6 only the first, 1 only the second, 3 neither. Of 7 discordant images 1 or fewer, or 6 or more, with
    # probability (1 + 7 + 7 + 1) / 2^7 = 16 / 128 = 0.125.
    first = right((10, True), (6, True), (1, False), (3, False))
    second = right((10, True), (6, False), (1, True), (3, False))
    assert mcnemar(first, second) == (6, 1, pytest.approx(0.125))
    assert mcnemar(second, first) == (1, 6, pytest.approx(0.125))
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_pareto_front_by_hand() -> None:
    # Costs 1, 2, 3, 4 with scores 50, 70, 60, 80: the third costs more than the second and is worse.
    assert pareto_front([1, 2, 3, 4], [50, 70, 60, 80]) == [0, 1, 3]
    assert pareto_front([4, 3, 2, 1], [80, 60, 70, 50]) == [3, 2, 0]  # cheapest first
    assert pareto_front([1, 1, 2], [50, 60, 60]) == [1]  # as cheap but worse; as good but dearer
    assert pareto_front([1, 1], [50, 50]) == [0, 1]  # neither beats the other


def cost(flops: int, milliseconds: float) -> Cost:
    timings = tuple(
        Timing(batch_size=b, repeats=10, median_ms=m, low_ms=m, high_ms=m, images_per_second=1000 * b / m)
        for b, m in ((1, milliseconds), (256, 100 * milliseconds))
    )
    return Cost(
        parameters=1000, flops_per_image=flops, timings=timings, device="test device", precision="fp32", torch="0",
        image_size=28,
    )  # fmt: skip


def outcome(
    name: str, errors: range, *, cfg: Config | None = None, spent: Cost | None = None, val_top1: float | None = None
) -> Outcome:
    labels = torch.arange(200) % 10
    logits = 5 * torch.nn.functional.one_hot(labels, 10).float()
    logits[errors.start : errors.stop] = logits[errors.start : errors.stop].roll(1, dims=1)
    trained = Trained(
        name=name, directory=Path(name), checkpoint="", weights=Path(name), cfg=cfg or Config(), info=INFO,
        summary={"status": "finished", "steps": 100} | ({} if val_top1 is None else {"val.top1": val_top1}),
        device=torch.device("cpu"),
    )  # fmt: skip
    return Outcome(
        name=name, model="cnn", directory=Path(name), split="test", tta="none", labels=labels, logits=logits,
        images=torch.zeros(200, 28, 28, dtype=torch.uint8), by_tta={"none": logits, "flip": logits},
        class_names=tuple(NAMES), validation=(logits, labels), cost=spent or cost(1_000_000, 2.0), trained=trained,
    )  # fmt: skip


def write_comparison(outcomes: list[Outcome], found: list[dict[str, Any]], folder: Path) -> str:
    return write_rows(comparison_rows(outcomes, found), outcomes, found, folder)


def results(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [summarize(outcome.logits, outcome.labels, NAMES) for outcome in outcomes]


def test_the_most_accurate_first_each_against_the_next(tmp_path: Path) -> None:
    outcomes = [
        outcome("dear", range(0, 20), spent=cost(9_000_000, 4.0)),  # 180 of 200: 90 %
        outcome("best", range(10, 20), spent=cost(4_000_000, 3.0)),  # 190: 95 %
        outcome("cheap", range(100, 140), spent=cost(1_000_000, 1.0)),  # 160: 80 %
    ]
    text = write_comparison(outcomes, results(outcomes), tmp_path)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["best", "dear", "cheap"]
    assert "95.00 %" in lines[2] and "4.00" in lines[2] and "300.0" in lines[2]
    # best is right where dear errs alone (0..9) and never the reverse: 2 / 2^10 = 0.00195.
    assert "10:0, p 0.002" in lines[2]
    assert "40:20" in lines[3]
    assert lines[2].endswith("FLOPs, ms") and lines[4].endswith("FLOPs, ms") and "ms" not in lines[3].split()[-1]
    assert "test device" in text
    pixels = matplotlib.image.imread(tmp_path / "comparison.png")
    assert pixels.shape[1] > 1900 and pixels[..., :3].std() > 0.02  # three panels


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    def at(place: str) -> Outcome:
        one = outcome("cnn", range(5))
        assert one.trained is not None
        return replace(one, trained=replace(one.trained, directory=Path(place)))

    runs = [at("/a/x/cnn"), at("/b/x/cnn"), at("/c/y/cnn"), replace(at("/z/mlp"), name="mlp")]
    assert [each.name for each in told_apart(runs)] == ["a/x/cnn", "b/x/cnn", "c/y/cnn", "mlp"]
    assert [each.name for each in told_apart([runs[0], replace(runs[1], trained=None)])] == ["cnn", "cnn"]


def test_seeds_are_grouped_and_other_changes_are_not(tmp_path: Path) -> None:
    other = Config(seed=3, optim=replace(OptimConfig(), lr=0.5))
    outcomes = [
        outcome("s0", range(0, 10), cfg=Config(seed=0, output_dir="a")),
        outcome("lr", range(0, 50), cfg=other),
        outcome("s1", range(0, 12), cfg=Config(seed=1, output_dir="b")),
        outcome("s2", range(0, 14), cfg=Config(seed=2, output_dir="c")),
    ]
    assert seed_groups(outcomes) == [[0, 2, 3]]
    # 95, 94 and 93 %: mean 94, standard deviation sqrt((1 + 0 + 1) / 2) = 1.
    text = write_comparison(outcomes, results(outcomes), tmp_path)
    (mean,) = (line for line in text.splitlines() if line.startswith("mean of 3 seeds (s0, s1, s2)"))
    assert "94.00 %  1.00 " in mean
    stored = json.loads((tmp_path / "comparison.json").read_text())["seeds"]
    assert [row["top1_range"] for row in stored] == [[pytest.approx(0.93), pytest.approx(0.95)]]
    assert stored[0]["top1_spread"] == pytest.approx(0.01)
    assert stored[0]["flops_per_image"] == 1_000_000 and "val_top1" not in stored[0]  # no run has one
    assert seed_groups([outcomes[0], replace(outcomes[0], name="again")]) == []  # one seed twice is no sample


def test_the_mean_of_seeds_has_what_all_of_them_have(tmp_path: Path) -> None:
    outcomes = [
        outcome("s0", range(0, 10), cfg=Config(seed=0), val_top1=0.91, spent=cost(1_000_000, 2.0)),
        outcome("s1", range(0, 20), cfg=Config(seed=1), val_top1=0.94, spent=cost(1_000_000, 4.0)),
    ]
    text = write_comparison(outcomes, results(outcomes), tmp_path)
    (row,) = json.loads((tmp_path / "comparison.json").read_text())["seeds"]
    assert row["val_top1"] == pytest.approx(0.925) and row["parameters"] == 1000
    assert row["latency_ms_1"] == pytest.approx(3.0) and "chosen" not in row and "num_images" not in row
    (mean,) = (line.split() for line in text.splitlines() if line.startswith("mean of 2 seeds"))
    # 92.5 % by validation, 92.5 % on test with a deviation of 5 / sqrt(2) = 3.54 points
    assert mean[mean.index("cnn") :][:8] == ["cnn", "1,000", "1.00", "92.50", "%", "-", "92.50", "%"]
    assert "3.54" in mean


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": {"model.weights": "a" * 64}},  # another run to begin from
        {"fingerprint": {"data.corrections": "b" * 64}},
        {"fingerprint": {"training images in data.root": "c" * 64}},
        {"checkpoint": "step_00000010"},  # not as far
        {"summary": {"status": "stopped", "steps": 100}},
        {"summary": {"status": "finished", "steps": 60}},  # as of schedule.minutes on a slower machine
    ],
)
def test_runs_of_other_data_weights_or_length_are_no_seeds_of_one_recipe(change: dict[str, Any]) -> None:
    made_of = {"model.weights": "none", "data.corrections": "none", "training images in data.root": "d" * 64}
    known = {"fingerprint": made_of, "summary": {"status": "finished", "steps": 100}}
    runs = [outcome(f"s{seed}", range(seed), cfg=Config(seed=seed)) for seed in range(3)]
    runs = [replace(run, trained=replace(run.trained, **known)) for run in runs]
    assert seed_groups(runs) == [[0, 1, 2]]
    change = {key: made_of | value if key == "fingerprint" else value for key, value in change.items()}
    other = replace(runs[2], trained=replace(runs[2].trained, **change))
    assert seed_groups([*runs[:2], other]) == [[0, 1]]
    old = replace(runs[2], trained=replace(runs[2].trained, fingerprint={}))  # from before there was one
    assert seed_groups([*runs[:2], old]) == [[0, 1, 2]]


def test_runs_of_several_lengths_have_no_mean_and_it_is_said(tmp_path: Path) -> None:
    def ended(name: str, seed: int, status: str, steps: int, checkpoint: str = "") -> Outcome:
        one = outcome(name, range(seed), cfg=Config(seed=seed))
        about = {"summary": {"status": status, "steps": steps}, "checkpoint": checkpoint}
        return replace(one, trained=replace(one.trained, **about))

    s0, s1, s2 = ended("s0", 0, "finished", 100), ended("s1", 1, "finished", 100), ended("s2", 2, "stopped", 60)
    text = write_comparison([s0, s1, s2], results([s0, s1, s2]), tmp_path)
    # no error of 200 and one: 100 and 99.5 %
    assert "\nmean of 2 seeds (s0, s1)" in text and "99.75 %" in text
    said = "A mean is over finished runs of one length: s0 (100 steps), s1 (100 steps), s2 (60 steps, unfinished).\n"
    assert said in text
    stopped = [ended("a", 0, "stopped", 60), ended("b", 1, "stopped", 60)]
    assert seed_groups(stopped) == [] and len(unequal_lengths(stopped)) == 1
    assert seed_groups([s0, ended("b", 1, "finished", 60)]) == []
    early = [ended(f"s{seed} step 60", seed, "stopped", 70, "step_00000060") for seed in (0, 1)]  # named by their step
    assert seed_groups([s0, s1, *early]) == [[0, 1], [2, 3]] and unequal_lengths([s0, s1, *early]) == []
    assert unequal_lengths([s0, ended("s0 step 60", 0, "finished", 100, "step_00000060")]) == []  # one run


def test_a_seed_that_is_there_twice_is_said(tmp_path: Path) -> None:
    runs = [outcome(name, range(5), cfg=Config(seed=seed)) for name, seed in (("a", 0), ("b", 1), ("copy", 0))]
    assert seed_groups(runs) == []
    text = write_comparison(runs, results(runs), tmp_path)
    assert "No mean of a, b, copy: seed 0 is there twice.\n" in text and "\nmean of" not in text
    assert repeated_seeds([runs[0], runs[2]]) == []  # a run and its copy: nothing is left out


def test_the_options_that_differ_and_the_choice_by_validation_are_said(tmp_path: Path) -> None:
    outcomes = [
        outcome("a", range(0, 10), cfg=Config(seed=0), val_top1=0.91),
        outcome("b", range(0, 20), cfg=Config(seed=1, optim=OptimConfig(lr=0.5, grad_clip_norm=None)), val_top1=0.93),
        outcome("c", range(0, 30), cfg=Config(seed=1, optim=OptimConfig(lr=0.5, grad_clip_norm=1.0))),
    ]
    rows = comparison_rows(outcomes, results(outcomes))
    assert rows[0]["options"] == {"seed": 0, "optim.lr": 0.001, "optim.grad_clip_norm": None}
    assert [row.get("chosen") for row in rows] == [None, True, None]  # the most accurate on test is not the choice
    text = write_comparison(outcomes, results(outcomes), tmp_path)
    a, b, c = text.splitlines()[2:5]
    _, _, said = text.partition("Options that differ:\n")
    assert said.splitlines()[:3] == [  # the most accurate first, as the rows
        "  a: optim.lr 0.001, optim.grad_clip_norm null, seed 0",
        "  b: optim.lr 0.5, optim.grad_clip_norm null, seed 1",
        "  c: optim.lr 0.5, optim.grad_clip_norm 1.0, seed 1",
    ]
    assert "by validation" in b and "93.00 %" in b and "by validation" not in a + c
    alike = [outcome("a", range(0, 10)), outcome("b", range(0, 20))]
    assert "Options that differ" not in write_comparison(alike, results(alike), tmp_path)
    apart = ensemble(outcomes[:2], tmp_path)
    assert (
        comparison_rows([outcomes[0], replace(apart, name="ens")], results([outcomes[0], apart]))[1].get("options")
        is None
    )


def test_the_choice_is_by_the_number_that_chose_the_epochs(tmp_path: Path) -> None:
    cfg = Config(evaluation=replace(Config().evaluation, best="loss"))
    outcomes = [outcome("a", range(0, 10), cfg=cfg), outcome("b", range(0, 20), cfg=cfg)]
    for each, loss in zip(outcomes, (0.3, 0.2), strict=True):
        each.trained.summary.update({"val.top1": 1 - loss / 10, "val.loss": loss})
    found = results(outcomes)
    rows = comparison_rows(outcomes, found)
    assert [row.get("chosen") for row in rows] == [None, True]  # the lower loss
    assert rows[0]["macro_f1"] == found[0]["macro_f1"] and "top5" not in rows[0]
    head, _, first = write_comparison(outcomes, found, tmp_path).splitlines()[:3]
    assert "macro F1" in head and "balanced" in head and f"{100 * found[0]['macro_f1']:.2f} %" in first
    other = [outcomes[0], replace(outcomes[1], trained=replace(outcomes[1].trained, cfg=Config()))]
    assert [row.get("chosen") for row in comparison_rows(other, found)] == [None, True]  # else by top1: 0.98
    outcomes[1].trained.summary["val.top1"] = 0.9
    assert [row.get("chosen") for row in comparison_rows(other, found)] == [True, None]


def test_a_checkpoint_has_no_validation_numbers_of_its_run() -> None:
    outcomes = [outcome("a", range(0, 10), val_top1=0.9), outcome("b", range(0, 20), val_top1=0.95)]
    outcomes[1] = replace(outcomes[1], trained=replace(outcomes[1].trained, checkpoint="step_00000100"))
    rows = comparison_rows(outcomes, results(outcomes))
    assert [(row["val_top1"], row.get("chosen")) for row in rows] == [(0.9, True), (None, None)]


def test_an_ensemble_averages_and_costs_the_sum(tmp_path: Path) -> None:
    # Each errs with logit 5 where the other is right with 5: the tie is broken, everything else is right.
    members = [outcome("a", range(0, 10)), outcome("b", range(50, 70)), outcome("c", range(90, 95))]
    together = ensemble(members, tmp_path)
    assert together.correct.all()  # two of three are right everywhere
    assert together.members == ("a", "b", "c")
    assert together.directory == tmp_path / "ensemble" / "test"
    assert together.cost is not None and together.cost.flops_per_image == 3_000_000
    assert (together.cost.timings[0].batch_size, together.cost.timings[0].median_ms) == (1, 6.0)
    assert together.cost.timings[1].images_per_second == pytest.approx(1000 * 256 / 600)
    assert together.validation is not None
    apart = ensemble([members[0], replace(members[1], validation=None)], tmp_path)
    assert apart.validation is None
    folds = [replace(member, val_published=torch.arange(fold, 1000, 5)) for fold, member in enumerate(members)]
    assert ensemble(folds, tmp_path).validation is None  # other validation images of the same labels
    assert ensemble([replace(fold, val_published=torch.arange(200)) for fold in folds], tmp_path).validation is not None
    assert sum_of_costs([cost(1, 1.0)]).measured is False


def test_runs_of_different_images_are_refused(tmp_path: Path) -> None:
    one, two = outcome("a", range(1)), outcome("b", range(1))
    two = replace(two, labels=two.labels.roll(1))
    with pytest.raises(ValueError, match="a and b were evaluated on different test images"):
        write_comparison([one, two], results([one, one]), tmp_path)
    # two folds of a data set that is sorted by class: other images, the same labels
    folds = [replace(one, split="val", published=torch.arange(fold, 1000, 5)) for fold in (0, 1)]
    with pytest.raises(
        ValueError, match="a and a were evaluated on different val images: compare runs of the same data"
    ):
        write_comparison(folds, results(folds), tmp_path)
    # two files of one layout: the same labels and positions, other pixels, which nothing but their digest tells
    arrays = [replace(one, data_sha256="1"), replace(one, name="b", data_sha256="2")]
    with pytest.raises(ValueError, match="a and b were evaluated on different test images"):
        write_comparison(arrays, results(arrays), tmp_path)
    for apart in ([one, two], folds, arrays, [one, replace(two, labels=two.labels[:9], logits=two.logits[:9])]):
        with pytest.raises(ValueError, match="were evaluated on different"):
            ensemble(apart, tmp_path)
    smaller = replace(arrays[1], info=replace(INFO, shape=(1, 14, 14)))  # the same pictures, stored smaller
    write_comparison([arrays[0], smaller], results([one, one]), tmp_path)
    assert ensemble([arrays[0], smaller], tmp_path).correct.sum() == 199


def test_what_counts_is_how_many_images_were_held_out() -> None:
    # data.holdout decides for a folder, nothing does for images in a file of their own: data.val_size may differ there
    config = Config()
    other = replace(config, data=replace(config.data, val_size=100))
    opened = [trained for cfg in (config, other) if (trained := outcome("a", range(1), cfg=cfg).trained)]
    for split in ("test", "val", "train"):
        check_comparable(opened, split)
    opened = [
        replace(trained, info=replace(INFO, num_val=held)) for trained, held in zip(opened, (5000, 9), strict=True)
    ]
    check_comparable(opened, "test")
    with pytest.raises(ValueError, match=r"different val images \(9 and 5,000 held out\): compare with --split test"):
        check_comparable(opened, "val")


ROWS = [
    {"run": "mlp", "model": "mlp", "parameters": 535818, "top1": 0.9, "top1_interval": [0.894, 0.9057]},
    {"run": "cnn", "model": "cnn", "parameters": 1234, "top1": 0.93125, "loss": 0.2, "images_per_second_256": 91234.5},
]


def test_comparison_table() -> None:
    header, rule, mlp, cnn = comparison_table(ROWS).split("\n")
    assert len(header) == len(rule) == len(mlp) == len(cnn)
    assert mlp.split() == ["mlp", "mlp", "535,818", "90.00", "%", "89.40-90.57", "-", "-"]
    # Round half to even of the binary value: 91234.5 -> 91,234.
    assert cnn.split() == ["cnn", "cnn", "1,234", "93.12", "%", "-", "0.2000", "91,234"]


def test_plot_comparison_without_costs(tmp_path: Path) -> None:
    plot_comparison([*ROWS, {"run": "unfinished"}], tmp_path / "comparison.png")
    plot_comparison([row | {"run": "a_$x_$"} for row in ROWS], tmp_path / "names.png")  # is no formula
    pixels = matplotlib.image.imread(tmp_path / "comparison.png")
    assert pixels.shape[1] == 1350  # 9 inches at 150 dpi: one panel
    with pytest.raises(ValueError, match="top1"):
        plot_comparison([{"run": "unfinished"}], tmp_path / "comparison.png")
