"""docs/recipes.md: effects, tables and figures from the queue's results, by hand; what is missing is said."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT

from experiments import recipe_figures, recipe_tables
from experiments.queue_entries import Entry, in_order
from experiments.queue_file import read_queue
from experiments.recipe_figures import draw_ablation, draw_amounts, draw_costs, draw_curves, draw_figures
from experiments.recipe_numbers import (
    ABLATED,
    AMOUNT,
    FINAL,
    Accuracy,
    Effect,
    Queued,
    accuracy,
    amounts,
    cost,
    effects,
    learning_curve,
)
from experiments.search_figure import draw_searches, draw_slice
from fmnist.report.figures import Axes, Figure


def result(top1: float, *, test: float | None = None, **more: Any) -> dict[str, Any]:
    """A result of two epochs whose validations were at 0.5 and `top1`."""
    found: dict[str, Any] = {
        "val": [
            {"epoch": 1.0, "top1": 0.5, "loss": 1.0, "seconds": 30.0},
            {"epoch": 2.0, "top1": top1, "loss": 0.5, "seconds": 90.0},
        ],
        "val.top1": max(0.5, top1), "epochs": 2.0, "parameters": 250_000, "cpu_seconds": 120.0, "options": {},
    }  # fmt: skip
    if test is not None:
        found |= {"test.top1": test, "test.top1_interval": [test - 0.01, test + 0.005], "test.macro_f1": test}
        found |= {"test.macro_f1_interval": [test - 0.02, test + 0.02]}
    return found | more


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write results by name, one a seed from 0, and return them with entries that expect three seeds each."""

    def written(group: str, **by_label: list[dict[str, Any]]) -> Queued:
        entries = []
        (tmp_path / "queue").mkdir(exist_ok=True)
        for label, results in by_label.items():
            name = f"{group}_{label}"
            entries.append(Entry(name=name, config="c", seeds=[0, 1, 2], group=group, label=label, note=label))
            for seed, content in enumerate(results):
                (tmp_path / "queue" / f"{name}_seed{seed}.json").write_text(json.dumps(content))
        return Queued(entries, tmp_path / "queue")

    return written


def axes() -> Axes:
    return Figure().add_subplot()


def test_an_effect_is_the_difference_of_means_with_the_pooled_spread(write: Any) -> None:
    # Last epochs 90, 91, 92 against 91, 93, 95 %: 91 and 93, so +2 points; variances 1 and 4 on two degrees each are
    # 2.5 pooled on four; Student's 97.5 % point of four degrees is 2.776: 2.776 * sqrt(2.5 * (1/3 + 1/3)) = 3.58.
    base, flip = ([result(top1) for top1 in values] for values in ((0.90, 0.91, 0.92), (0.91, 0.93, 0.95)))
    queue = write("a", none=base, flip=flip, shift=[])
    found = effects(queue, "a", taken=False)
    assert set(found) == {"flip"} and found["flip"].seeds == 3  # shift is not measured
    assert found["flip"].points == pytest.approx(2.0) and found["flip"].half == pytest.approx(3.584, abs=1e-3)
    # Taken from all: 91 % with it, 93 % without it, so it costs 2 points.
    assert effects(queue, "a", taken=True)["flip"].points == pytest.approx(-2.0)
    one = effects(write("b", none=[result(0.9)], ema=[result(0.4)]), "b", taken=False)
    assert one["ema"].points == pytest.approx(-50.0) and one["ema"].half is None  # the last epoch, not the best (0.5)
    assert effects(write("c", none=[], ema=[result(0.9)]), "c", taken=False) == {}  # nothing to compare with


def test_the_ablation_draws_each_factor_where_its_numbers_are() -> None:
    panel = axes()
    added = {"flip": Effect(1.5, 0.4, 3), "ema": Effect(-0.5, None, 1)}
    taken = {"flip": Effect(0.25, 0.5, 3)}
    draw_ablation(panel, added, taken)
    assert [label.get_text() for label in panel.get_yticklabels()] == ["EMA", "flip"]  # the most useful on top
    first, second = panel.containers
    assert (first.get_label(), second.get_label()) == ("added to nothing", "beside all others")
    assert list(first.lines[0].get_xdata()) == [-0.5, 1.5] and list(first.lines[0].get_ydata()) == [0.16, 1.16]
    ends = [segment[:, 0].tolist() for segment in first.lines[2][0].get_segments()]
    assert ends == [[-0.5, -0.5], [pytest.approx(1.1), pytest.approx(1.9)]]  # one seed has no interval
    assert list(second.lines[0].get_xdata()) == [0.25] and list(second.lines[0].get_ydata()) == [0.84]


def test_factors_of_one_effect_are_drawn_in_the_order_of_the_queue() -> None:
    panel = axes()
    names = ["scale", "flip", "ema", "mixup", "shift"]
    draw_ablation(panel, {name: Effect(0.5, None, 1) for name in names}, {})
    assert [label.get_text() for label in panel.get_yticklabels()] == ["scale", "flip", "EMA", "mixup", "shift"]


def test_accuracy_spans_the_intervals_of_all_seeds(write: Any) -> None:
    assert accuracy([]) is None and accuracy([result(0.9)]) is None  # a search has no test number
    found = accuracy([result(0.9, test=0.90, options={"optim.lr": 0.02}), result(0.9, test=0.92)])
    assert found is not None and found.mean == pytest.approx(91.0) and found.lr == 0.02
    assert (found.low, found.high) == (pytest.approx(89.0), pytest.approx(92.5))  # 90 - 1 and 92 + 0.5
    alone = accuracy([result(0.9, test=0.9)])
    assert alone is not None and alone.lr == 0.001  # the default is not among a result's options


def test_amounts_are_found_by_images_a_class_and_drawn_there(write: Any) -> None:
    model = "EfficientNet-Lite0, from scratch"
    group, whole = AMOUNT[model]
    hundred = [result(0.5, test=0.5, options={"optim.lr": 0.005}), result(0.5, test=0.7)]
    queue = write(group, **{"1000": hundred, "5000": [result(0.5)]})
    assert whole == "final_lite0_scratch"
    queue = Queued([*queue.entries, *write("final", lite0_scratch=[result(0.9, test=0.9)]).entries], queue.results)
    found = amounts(queue, model)
    assert list(found) == [100, 5_500]  # 1,000 and 55,000 images; 5,000 has no test number, the others nothing
    panel = axes()
    draw_amounts(panel, {"none": {}, model: found})
    (drawn,) = panel.containers
    assert drawn.get_label() == model
    assert list(drawn.lines[0].get_xdata()) == [10, 100, 500, 2_000, 5_500]
    # no line crosses what is not measured
    assert list(drawn.lines[0].get_ydata()) == pytest.approx([np.nan, 60.0, np.nan, np.nan, 90.0], nan_ok=True)
    low, high = drawn.lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == (pytest.approx(49.0), pytest.approx(70.5))
    assert [text.get_text() for text in panel.get_xticklabels()] == ["10", "100", "500", "2,000", "5,500"]
    assert panel.get_xscale() == "log"
    row = recipe_tables.amount_table(queue).splitlines()[-1]
    assert row == (
        f"| {model} | not measured | 60.00 ± 14.14, lr 0.005 (two seeds) | not measured | not measured |"
        " 90.00 (one seed) |"
    )


def test_a_curve_has_epochs_and_shares_of_the_processor_time() -> None:
    found = learning_curve([result(0.8), result(0.9, cpu_seconds=240.0)])
    assert found is not None and found.epochs == [1.0, 2.0]
    # 2 and 4 minutes, 3 on average; both epochs are of one image size, so half of it each.
    assert found.minutes == pytest.approx([1.5, 3.0])
    assert found.mean == [50.0, pytest.approx(85.0)] and found.low[1] == pytest.approx(80.0)
    # 4 and 2 minutes, 3 on average, in parts of 10, 10 and 2 * 20 seconds: one epoch was held up.
    points = [{"epoch": epoch, "top1": 0.5, "loss": 1.0, "seconds": at} for epoch, at in ((1, 10), (2, 20), (4, 60))]
    sizes = {"augment.size": {"0": 20, "2": 28}}
    late = [point | {"seconds": point["seconds"] + 500 * (point["epoch"] > 1)} for point in points]
    runs = [result(0.8, val=val, options=sizes, cpu_seconds=60.0 * each) for each, val in ((4, points), (2, late))]
    grown = learning_curve(runs)
    assert grown is not None and grown.minutes == pytest.approx([0.5, 1.0, 3.0])
    killed = learning_curve([result(0.8, cpu_seconds=None)])
    assert killed is not None and killed.minutes is None
    old = [{"epoch": 1.0, "top1": 0.5, "loss": 1}, {"epoch": 2.0, "top1": 0.8, "loss": 1}]
    without = learning_curve([result(0.8, val=old)])
    assert without is not None and without.minutes == [1.0, 2.0]  # by epochs
    assert learning_curve([]) is None
    assert learning_curve([result(0.8), result(0.9, val=old[:1])]) == learning_curve([result(0.8)])  # a line is missing
    panel = axes()
    draw_curves(panel, {"a": found, "b": None, "c": killed}, "minutes")
    (line,) = panel.get_lines()
    assert line.get_label() == "a" and list(line.get_xdata()) == found.minutes and list(line.get_ydata()) == found.mean
    draw_curves(panel := axes(), {"a": found, "b": None, "c": killed}, "epochs")
    assert [line.get_label() for line in panel.get_lines()] == ["a", "c"]


def test_costs_stand_at_their_minutes_under_a_staircase() -> None:
    assert cost([result(0.5), result(0.5, cpu_seconds=None), result(0.5, cpu_seconds=360.0)]) == 4.0
    assert cost([result(0.5, cpu_seconds=None)]) is None
    panel = axes()
    points = {
        "good": (4.0, Accuracy(93.0, 92.0, 94.0, [93.0], 0.1)),
        "poor": (9.0, Accuracy(91.0, 90.0, 92.0, [91.0], 0.1)),
    }
    draw_costs(panel, points)
    assert [(*bar.lines[0].get_xdata(), *bar.lines[0].get_ydata()) for bar in panel.containers] == [
        (4.0, 93.0),
        (9.0, 91.0),
    ]
    staircase = panel.get_lines()[-1]
    assert list(staircase.get_ydata()) == [93.0, 93.0]  # paying more buys nothing
    assert [bar.get_label() for bar in panel.containers] == ["good", "poor"]


def test_a_slice_shows_every_trial_and_the_best_of_each_value() -> None:
    panel = axes()
    draw_slice(panel, "optim.lr", [(0.01, 90.0, False), (0.001, 91.0, False), (0.01, 92.0, False), (0.001, 80.0, True)])
    finished, stopped, best = panel.get_lines()
    assert [text.get_text() for text in panel.get_xticklabels()] == ["0.001", "0.01"]  # in order, whatever the trials'
    assert sorted(zip(finished.get_xdata(), finished.get_ydata(), strict=True)) == [(0, 91.0), (1, 90.0), (1, 92.0)]
    assert list(stopped.get_ydata()) == [80.0] and stopped.get_markerfacecolor() == "none"
    assert list(best.get_ydata()) == [91.0, 92.0]
    draw_slice(panel := axes(), "optim.name", [("sgd", 90.0, False), ("adamw", 91.0, False), (True, 9.0, False)])
    assert [text.get_text() for text in panel.get_xticklabels()] == ["sgd", "adamw", "True"]


def everything(folder: Path, seeds: int = 3) -> Queued:
    """The project's own queue, each run with a result made up from its name."""
    entries = read_queue(ROOT / "experiments" / "queue.yaml")
    for entry, seed in in_order(entries):
        if entry.seeds.index(seed) < seeds:
            top1 = 0.86 + 0.06 * (hash_of(entry.label or entry.name) + 0.02 * hash_of(f"{entry.name}{seed}"))
            options = {key: value for key, value in entry.varied.items() if key == "optim.lr"}
            content = result(top1, test=None if entry.search else top1, options=options)
            content["cpu_seconds"] = 60 + 4000 * hash_of(entry.name)
            if entry.stop_after and top1 < 0.88:
                content["stopped_at_epoch"] = 5
            (folder / f"{entry.name}_seed{seed}.json").write_text(json.dumps(content))
    return Queued(entries, folder)


def hash_of(text: str) -> float:
    """A number in 0 to 1 that depends on a text alone."""
    return sum(ord(letter) * (7 + i) for i, letter in enumerate(text)) % 97 / 97


def test_every_figure_is_drawn_from_a_whole_queue_and_the_page_is_full(tmp_path: Path) -> None:
    (results := tmp_path / "queue").mkdir()
    queue = everything(results)
    drawn = draw_figures(queue, tmp_path)
    assert [path.name for path in drawn] == [f"recipes_{name}.png" for name in recipe_figures.PLOTS]
    for path in drawn:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.shape[1] > 1000 and np.ptp(pixels, axis=2).max() > 0.02 and pixels.std() > 0.02
    page = recipe_tables.marks(queue)
    for name in ("ablation", "search_cnn", "search_mlp", "clip_art"):
        assert recipe_tables.NOT_MEASURED not in page[name], name
    unmeasured = [row for row in page["final"].splitlines() if recipe_tables.NOT_MEASURED in row]
    assert len(unmeasured) == 3 and all("not measured: for a GPU" in row for row in unmeasured)
    for config in recipe_tables.ON_A_GPU.values():
        assert "not measured" in (ROOT / config).read_text().splitlines()[2]  # its header says the same
    assert page["amount"].count(recipe_tables.NOT_MEASURED) == 1  # all images of one: no such run
    assert page["final"].count("3 of 3") == len(FINAL) - 2 and "1 of 1" in page["final"]
    assert page["final"].splitlines()[2].count(" to ") == 1  # an interval
    assert page["ablation"].count(" ± ") == 4 * 11 and "recipes_ablation.png" in page["ablation"]
    lines = sum(text.count("\n") for text in page.values())
    fixed = (ROOT / "docs" / "recipes.md").read_text().count("\n") - sum(
        text.count("\n") for text in recipe_tables.marks(recipe_tables.queued()).values()
    )
    assert fixed + lines <= 120  # of the page, when all is measured
    groups = ("amount_lite0_pretrained", "amount_lite0_scratch", "search_mlp")
    searched = [entry for entry in queue.entries if entry.group in groups and entry.label in ("", "100")]
    names = [path.name for path in draw_searches(searched, results, tmp_path / "searches")]
    assert names == ["amount_lite0_pretrained_100.png", "amount_lite0_scratch_100.png", "search_mlp.png"]


def test_of_an_empty_queue_the_page_says_that_nothing_is_measured(tmp_path: Path) -> None:
    queue = Queued(read_queue(ROOT / "experiments" / "queue.yaml"), tmp_path)
    assert draw_figures(queue, tmp_path) == [] and list(tmp_path.iterdir()) == []
    page = recipe_tables.marks(queue)
    assert all(recipe_tables.NOT_MEASURED in text and ".png" not in text for text in page.values())
    assert page["ablation"].count(recipe_tables.NOT_MEASURED) == 11 * 2 * len(ABLATED)


def test_one_seed_or_one_half_of_the_ablations_is_drawn_as_it_is(tmp_path: Path) -> None:
    queue = everything(tmp_path, seeds=1)
    for path in (*tmp_path.glob("ablation_cnn_taken*"), *tmp_path.glob("ablation_convnext*")):
        path.unlink()
    found = effects(queue, "ablation_cnn_added", taken=False)
    assert len(found) == 11 and all(effect.half is None for effect in found.values())
    assert tmp_path / "recipes_ablation.png" in draw_figures(queue, tmp_path)
    row = recipe_tables.ablation_table(queue).splitlines()[2]
    assert row.startswith("| flip | ") and row.endswith("(one seed) | not measured | not measured | not measured |")
    assert not math.isnan(found["flip"].points)


def test_the_page_embeds_the_figures_that_there_are() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in recipe_figures.PLOTS:
        path = recipe_tables.figure_path(ROOT / "docs", name)
        assert path.is_file() == (f"]({path.name})" in page), name
    assert page.count("\n") <= 120
