"""The tables of docs/recipes.md, from the JSON results of the queue."""

from collections.abc import Sequence
from pathlib import Path

from experiments.markdown import markdown_table
from experiments.queue_entries import Entry
from experiments.queue_file import read_queue
from experiments.queue_results import numbers, read_results, spread
from experiments.recipe_numbers import (
    ABLATED,
    ALL_IMAGES,
    AMOUNT,
    AMOUNTS,
    FINAL,
    Accuracy,
    Effect,
    Queued,
    accuracy,
    amounts,
    cost,
    drawn_models,
    effects,
    timed,
)

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "not measured"
# Recipes of which no run is in the queue.
ON_A_GPU = {
    "ConvNeXt-Tiny, ImageNet weights": "configs/convnext_tiny.yaml",
    "WRN-16-8": "experiments/recipes/wide_resnet.yaml",
    "CNN in seconds": "experiments/recipes/speedrun.yaml",
}


def queued() -> Queued:
    """Return the project's own queue."""
    return Queued(read_queue(ROOT / "experiments" / "queue.yaml"), ROOT / "experiments" / "results" / "queue")


def final_table(queue: Queued) -> str:
    """Return the accuracy and cost of each recipe, mean and standard deviation over seeds, and their 95 % intervals."""
    rows = []
    for title, name in FINAL.items():
        found = queue.of(name)
        entry = next(entry for entry in queue.entries if entry.name == name)
        model, seeds = f"[{title}](../{entry.config})", len(entry.seeds)
        if not found:
            rows.append([model, *["-"] * 3, NOT_MEASURED, NOT_MEASURED, f"0 of {seeds}"])
            continue
        minutes, top1 = cost(found), accuracy(found)
        interval = f" ({top1.low:.1f} to {top1.high:.1f})" if top1 else ""
        rows.append(
            [
                model,
                f"{found[0]['parameters'] / 1e6:.2f} M",
                f"{found[0]['epochs']:.3g}",
                "-" if minutes is None else f"{minutes:.1f}",
                spread(numbers(found, "val.top1"), scale=100),
                f"**{spread(numbers(found, 'test.top1'), scale=100)}**{interval}",
                f"{len(found)} of {seeds}",
            ]
        )
    rows += [
        [f"[{title}](../{config})", *["-"] * 3, NOT_MEASURED, f"{NOT_MEASURED}: for a GPU", "none"]
        for title, config in ON_A_GPU.items()
    ]
    head = ("model", "parameters", "epochs", "processor minutes", "val top1, %", "test top1, %", "seeds")
    return markdown_table(head, rows)


def ablation_table(queue: Queued) -> str:
    """Return what each factor is worth in points, added to nothing and taken from all, a row a factor."""
    groups = [f"{prefix}_{how}" for prefix in ABLATED.values() for how in ("added", "taken")]
    found = {group: effects(queue, group, group.endswith("taken")) for group in groups}
    head = ["factor", *(f"{model}, {how}" for model in ABLATED for how in ("added", "taken"))]
    labels = [entry.label for entry in queue.members(groups[0]) if entry.label != "none"]
    rows = [[factor_name(label), *(shown(found[group].get(label)) for group in groups)] for label in labels]
    return markdown_table(head, rows)


def factor_name(label: str) -> str:
    """Return a factor's name as it is written in a text."""
    special = {"cutmix": "CutMix", "ema": "EMA", "dropout": "dropout or drop path"}
    return special.get(label, label.replace("_", " "))


def shown(effect: Effect | None) -> str:
    """Return an effect in points with its interval."""
    if effect is None:
        return NOT_MEASURED
    return f"{effect.points:+.2f}" + (" (one seed)" if effect.half is None else f" ± {effect.half:.2f}")


def amount_table(queue: Queued) -> str:
    """Return test top1 by model and images a class, with the learning rate that was chosen on validation."""
    columns = [amount // 10 for amount in (*AMOUNTS, ALL_IMAGES)]
    rows = []
    for model in AMOUNT:
        found = amounts(queue, model)
        rows.append([model, *(amount_cell(found.get(count), count) for count in columns)])
    return markdown_table(["test top1, %, images a class", *map("{:,}".format, columns[:-1]), "all 5,500"], rows)


def amount_cell(found: Accuracy | None, count: int) -> str:
    """Return mean and spread of the seeds, and the rate where it was searched."""
    if found is None:
        return NOT_MEASURED
    rate = "" if count == ALL_IMAGES // 10 else f", lr {found.lr:g}"
    seeds = {1: " (one seed)", 2: " (two seeds)"}.get(len(found.top1), "")
    return spread(found.top1) + rate + seeds


def search_table(entries: Sequence[Entry], results: Path, most: int | None = None) -> str:
    """Return the trials of a search that have a result, most accurate first; at most so many."""
    rows = []
    for entry in entries:
        for result in read_results(entry, results):
            stopped = result.get("stopped_at_epoch")
            epochs = f"stopped at {stopped:g}" if stopped else f"{result['epochs']:g}"
            seconds = result["cpu_seconds"]
            cells = [
                trial_name(entry),
                epochs,
                f"{100 * result['val.top1']:.2f}",
                f"{100 * result['val'][-1]['top1']:.2f}",
            ]
            rows.append((result["val.top1"], [*cells, "-" if seconds is None else f"{seconds / 60:.1f}"]))
    head = ("trial", "epochs", "val top1, best, %", "last, %", "processor minutes")
    rows.sort(key=lambda row: -row[0])
    return markdown_table(head, [cells for _, cells in rows[:most]]) if rows else NOT_MEASURED


def trial_name(entry: Entry) -> str:
    """Return what tells a trial from the others: its options of the grid, else its note."""
    return ", ".join(f"{key} {value}" for key, value in entry.varied.items()) or entry.note


def search_line(entries: Sequence[Entry], results: Path) -> str:
    """Return the best of the trials of a search that have a result, in a sentence."""
    found = [(result["val.top1"], entry, result) for entry in entries for result in read_results(entry, results)]
    if not found:
        return NOT_MEASURED
    top1, best, _ = max(found, key=lambda each: each[0])
    stopped = sum("stopped_at_epoch" in result for _, _, result in found)
    tried = f"{len(found)} of {len(entries)} trials, {stopped} stopped early"
    return f"{tried}; the best has {100 * top1:.2f} % on validation: {trial_name(best)}."


def clip_art_table(queue: Queued) -> str:
    """Return what pretraining and balanced sampling are worth on colour pictures, one seed each."""
    rows = []
    for entry in queue.entries:
        if entry.name.startswith("clip_art"):
            found = queue.of(entry.name)
            if (top1 := accuracy(found)) is None:
                rows.append([entry.note, "-", NOT_MEASURED, NOT_MEASURED])
                continue
            low, high = (100 * end for end in found[0]["test.macro_f1_interval"])
            f1 = f"{100 * found[0]['test.macro_f1']:.1f} ({low:.1f} to {high:.1f})"
            shown_top1 = f"**{top1.mean:.1f}** ({top1.low:.1f} to {top1.high:.1f})"
            rows.append([entry.note, f"{found[0]['epochs']:g}", shown_top1, f1])
    return markdown_table(("EfficientNet-Lite0, 96 px", "epochs", "test top1, %", "macro F1, %"), rows)


def drawable(queue: Queued) -> dict[str, str]:
    """Return the captions of the figures that have anything to show, by name."""
    groups = [f"{prefix}_{how}" for prefix in ABLATED.values() for how in ("added", "taken")]
    captions = {
        "ablation": (any(effects(queue, group, taken=False) for group in groups), "What each regulariser is worth"),
        "amount": (any(len(amounts(queue, model)) > 1 for model in AMOUNT), "Accuracy against images a class"),
        "curves": (
            any(queue.of(FINAL[model]) for model in drawn_models()),
            "Learning curves against epochs and processor minutes",
        ),
        "cost": (len(timed(queue)) > 1, "Accuracy against processor minutes"),
        "search_mlp": (
            any(read_results(trial, queue.results) for trial in queue.members("search_mlp")),
            "The search by each of its options",
        ),
    }
    return {name: caption for name, (there, caption) in captions.items() if there}


def figure_path(folder: Path, name: str) -> Path:
    """Return where a figure of docs/recipes.md is."""
    return folder / f"recipes_{name}.png"


def marks(queue: Queued) -> dict[str, str]:
    """Return what stands between the marks of docs/recipes.md: a table each, and its figures where there are any."""
    captions = drawable(queue)

    def block(text: str, *figures: str) -> str:
        shown = [f"![{captions[name]}]({figure_path(Path(), name)})" for name in figures if name in captions]
        return f"{text}\n\n{' '.join(shown)}" if shown else text

    searched = [entry for entry in queue.entries if entry.name.startswith("search_cnn")]
    return {
        "final": block(final_table(queue), "cost", "curves"),
        "ablation": block(ablation_table(queue), "ablation"),
        "amount": block(amount_table(queue), "amount"),
        "search_cnn": search_table(searched, queue.results, most=4),
        "search_mlp": block(search_line(queue.members("search_mlp"), queue.results), "search_mlp"),
        "clip_art": clip_art_table(queue),
    }
