"""Record measurements as JSON, and make what the pages quote: tables, the report, and train.py's loop.

    python -m experiments.tables record RUN_DIRECTORY NAME "COMMAND" [--note TEXT]
    python -m experiments.tables compare comparison/comparison.json "COMMAND" [--name NAME]
    python -m experiments.tables table

`table` rewrites what stands between the marks `<!-- NAME: begin -->` and `<!-- NAME: end -->` in README.md and docs/.
"""

import argparse
import ast
import datetime
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from experiments import mirrored, prediction_sets, recipe_tables
from experiments.markdown import markdown_table
from experiments.queue_results import numbers, spread, table
from fmnist.runtime.files import read_json, write_json
from fmnist.runtime.provenance import measured_now, processor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
SEEDS = {  # a recorded run's other seeds
    "mlp": "mlp_muon",
    "cnn": "cnn_10_epochs",
    "convnext_32px": "convnext_muon",
    "efficientnet_lite0": "final_lite0",
}


def record(run: Path, name: str, command: str, note: str) -> Path:
    """Write experiments/results/NAME.json from a finished run: its summary, and the spread of its speed."""
    summary = read_json(run / "summary.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["images_per_second"] for line in lines if line.get("images_per_second"))
    evaluation = read_json(run / "evaluation" / "test" / "metrics.json")
    result: dict[str, Any] = {
        "name": name,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "hardware": {"device": summary["device"], "processor": processor(), "cpu_cores": os.cpu_count()},
        "versions": summary["versions"],
        "git_revision": summary["git_revision"],
        "runs": 1,
        "images_per_second": {
            "median": round(statistics.median(rates), 1),
            "lowest": round(rates[0], 1),
            "highest": round(rates[-1], 1),
            "windows": len(rates),
        },
        "test.top1_interval": evaluation["top1_interval"],
        "test.ece": evaluation["ece"],
        "note": note,
    }
    keys = "model parameters epochs steps seed val.top1 test.top1 test.loss test.num_images train_seconds"
    keys += " images_per_second_overall share_outside_steps save_seconds"
    return write_result(result | {key: summary[key] for key in keys.split()})


def record_comparison(path: Path, command: str, name: str) -> Path:
    """Write experiments/results/NAME.json from what `evaluate.py RUN RUN ...` wrote."""
    result = {"name": name, "command": command, **measured_now(), **read_json(path)}
    return write_result(result)


def write_result(result: dict[str, Any]) -> Path:
    """Write experiments/results/NAME.json."""
    path = RESULTS / f"{result['name']}.json"
    write_json(path, result)
    return path


def comparison_table() -> str:
    """Return the table of the recorded comparison, most accurate first."""
    result = read_json(RESULTS / "comparison.json")
    rows = []
    for row in result["rows"]:
        low, high = (100 * bound for bound in row["top1_interval"])
        next_row = row.get("mcnemar")
        test = f"{next_row[0]} : {next_row[1]} ({next_row[2]:.2g})" if next_row else "-"
        top1 = f"**{100 * row['top1']:.2f} %** ({low:.2f} to {high:.2f})"
        costs = f"{row['parameters']:,}", f"{row['flops_per_image'] / 1e6:,.1f}"
        speed = f"{row['images_per_second_256']:,.0f}", f"{row['latency_ms_1']:.3g}"
        rows.append((row["run"], *costs, top1, *speed, test))
    head = ["model", "parameters", "MFLOPs per image", "top1 (95 % interval)", "images/s at batch 256", "ms at batch 1"]
    return markdown_table([*head, "only this model right : only the next model right (McNemar p)"], rows)


def results_table() -> str:
    """Return the table of accuracies, a row per recorded run, over its seeds where there are several; best first."""
    results = [read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    runs = sorted((each for each in results if "test.top1" in each), key=lambda each: each["test.top1"], reverse=True)
    queue = recipe_tables.queued()
    rows = []
    for r in runs:
        low, high = (100 * bound for bound in r["test.top1_interval"])
        seeds = numbers(queue.of(SEEDS[r["name"]]), "test.top1") if r["name"] in SEEDS else []
        several = f"**{spread(seeds, scale=100)} %** ({len(seeds)} seeds)"
        top1 = several if len(seeds) > 1 else f"**{100 * r['test.top1']:.2f} %** ({low:.2f} to {high:.2f})"
        overall = r.get("images_per_second_overall")
        what = f"{r['note']}, {r['parameters'] / 1e6:.2f} M parameters"
        times = f"{r['train_seconds'] / 60:.1f} min", f"{r['images_per_second']['median']:,.0f}"
        shown = "not measured" if overall is None else f"{overall:,.0f}"
        rows.append((what, f"`{r['command']}`", machine(r), f"{r['epochs']:g}", *times, shown, top1))
    head = ("what", "command", "hardware", "epochs", "training", "images/s", "overall", "test top1")
    return markdown_table(head, rows)


def benchmark_table(mode: str, title: str, ratio: str) -> str:
    """Return a table of the benchmark, a part per recorded machine and setting.

    Args:
        mode: data or train, of the command.
        title: what the parts' titles begin with; the first column's head.
        ratio: the last column's head.
    """
    rows = []
    for path in sorted(RESULTS.glob(f"benchmark_*_{mode}.json")):
        result = read_json(path)
        for part in result["tables"]:
            rows.append((f"**{part['title'].removeprefix(title).lstrip(', ')}, {machine(result)}**", "", ""))
            for row in (row for row in part["rows"] if "failed" not in row):
                against = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
                rows.append((row["description"], rates(row["images_per_second"]), against))
    return markdown_table((title, "images/s, median (lowest to highest)", ratio), rows)


def rates(found: dict[str, Any]) -> str:
    """Return the median of some rounds with the lowest and the highest."""
    return f"{found['median']:,.0f} ({found['min']:,.0f} to {found['max']:,.0f})"


def accuracy_table() -> str:
    """Return the times to accuracy, a row per recorded recipe and target, mean and standard deviation over its runs."""
    lines = []
    for path in sorted(RESULTS.glob("accuracy_*.json")):
        result = read_json(path)
        rows = result["rows"]
        epochs, top1 = [row["epoch"] for row in rows], [row["test_top1"] for row in rows]
        held = f"{len(rows)} of {len(rows) + len(result['missed'])}"
        times = [
            spread([row[key] for row in rows], digits=1)
            for key in ("seconds", "seconds_from_step_0", "processor_seconds")
        ]
        recipe = f"`{result['config']}`, {100 * result['target']:g} %"
        where = f"{machine(result)}, {result['hardware']['processor']}, {result['date']}"
        lines.append((recipe, held, spread(epochs, digits=1), *times, spread(top1, scale=100), where))
    head = ["recipe, target on validation", "runs that hold it", "epochs", "seconds", "since step 0"]
    return markdown_table([*head, "processor seconds", "test top1 at the end, %", "on"], lines)


def programs_table() -> str:
    """Return the table of whole programs, a part per recorded machine and setting."""
    rows = []
    for path in sorted(RESULTS.glob("benchmark_*_programs*.json")):
        result = read_json(path)
        setting = f"{result['model']}, {result['size']} px, batch {result['batch_size']}, {result['precision']}"
        setting += ", compiled" * result["compiled"]
        rows.append((f"**{setting}, {machine(result)}, timm {result['timm_sources']}**", "", "", ""))
        for row in (row for row in result["rows"] if "failed" not in row):
            rows.append((row["name"], rates(row), f"{row.get('ratio', math.nan):.2f}", f"{row['seconds']:.0f}"))
    head = ("program", "images/s, median (lowest to highest)", "ratio", "seconds of the whole process")
    return markdown_table(head, rows)


def waits_table() -> str:
    """Return what steps and saves cost before and after their waits were taken away, a row a measurement."""
    dispatches, saves = read_json(RESULTS / "dispatches.json"), read_json(RESULTS / "save_speed.json")["medians"]
    update = ("gradient norm", "optimizer", "moving average")
    rows = []
    for model in ("mlp", "cnn", "convnext_tiny"):
        before, after = (
            sum(dispatches[label]["operations"][model][part] for part in update) for label in ("before", "after")
        )
        what = f"operations that a step launches for norm, AdamW and moving average, `{model}`"
        rows.append((what, f"{before}", f"{after}", "dispatches"))
    waited, beside = (saves[name] for name in ("waited for", "beside the steps"))
    shown = [f"{each['save_seconds']:.1f} s, {100 * each['share_outside_steps']:.1f} %" for each in (waited, beside)]
    megabytes = waited["checkpoint_bytes"] / 1e6
    what = f"four saves of {megabytes:.0f} MB in 40 steps: what steps wait for them, share of time outside steps"
    rows.append((what, *shown, "save_speed"))
    for row in read_json(RESULTS / "exact_cost.json")["processor_seconds"]:
        if row["shards"] == 1:
            times = (f"{1e3 * row[kind]:.2f} ms" for kind in ("filled", "exact"))
            rows.append((f"a step of `{row['model']}` with `--exact 1`, memory filled or not", *times, "exact_cost"))
    for name in ("depthwise_speed", "depthwise_speed_amd"):
        found = read_json(RESULTS / f"{name}.json")["cpu"]
        for model in ("convnext_atto, 32 px, batch 256", "configs/efficientnet_lite0.yaml"):
            shown = [f"{found['steps'][model][f'{kind}_images_per_second']:,.0f} images/s" for kind in ("conv", "auto")]
            what = f"{model}, convolutions or matrix products, {found['hardware']['device']}"
            rows.append((what, *shown, name))
    return markdown_table(("what", "before", "after", "from"), [(*cells, f"`{file}.json`") for *cells, file in rows])


def exact_table() -> str:
    """Return what `--exact` costs a step, in milliseconds of processor time."""
    rows = []
    for row in read_json(RESULTS / "exact_cost.json")["processor_seconds"]:
        times = [f"{1e3 * row[kind]:.1f}" for kind in ("plain", "parts", "exact", "filled")]
        ratios = [f"{row['exact'] / row[kind]:.2f}" for kind in ("plain", "parts")]
        rows.append((row["model"], row["shards"], *times, *ratios))
    columns = ("one batch of 128, ms", "V micro-batches, ms", "`--exact V`, ms", "with memory filled, ms")
    return markdown_table(("model", "V", *columns, "of one batch", "of V micro-batches"), rows)


def machine(result: dict[str, Any]) -> str:
    """Return what a command ran on, in a few words."""
    hardware = result["hardware"]
    device = str(hardware["device"])
    return f"{hardware['cpu_cores']}-core CPU" if device.startswith("CPU") else device


def loop() -> str:
    """Return the function `train` of train.py as its file has it."""
    source = (ROOT / "train.py").read_text()
    function = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "train")
    return f"```python\n{ast.get_source_segment(source, function)}\n```"


def updated_pages() -> dict[Path, str]:
    """Return the pages that hold tables, the report or the loop, with those made anew."""
    report = (ROOT / "docs" / "report.txt").read_text().strip()
    contents = {
        "README.md": {"loop": loop(), "results": results_table()},
        "docs/evaluate.md": {"report": f"```text\n{report}\n```", "comparison": comparison_table()},
        "docs/benchmark.md": {
            "loaders": benchmark_table("data", "loaders alone", "ratio"),
            "training": benchmark_table("train", "training", "to synthetic"),
            "programs": programs_table(),
            "accuracy": accuracy_table(),
            "waits": waits_table(),
        },
        "docs/trust.md": {
            "sets": prediction_sets.sets_table(),
            "classes": prediction_sets.classes_table(),
            "automation": prediction_sets.automation_table(),
        },
        "docs/exact.md": {"cost": exact_table()},
        "docs/augment.md": {"mirrored": mirrored.table()},
        "docs/recipes.md": recipe_tables.marks(queue := recipe_tables.queued()),
        "experiments/results/queue.md": {"queue": table(list(queue.entries), queue.results)},
    }
    pages = {}
    for name, marks in contents.items():
        text = (ROOT / name).read_text()
        for mark, content in marks.items():
            before, rest = text.split(f"<!-- {mark}: begin -->")
            after = rest.split(f"<!-- {mark}: end -->")[1]
            text = f"{before}<!-- {mark}: begin -->\n{content}\n<!-- {mark}: end -->{after}"
        pages[ROOT / name] = text
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="job", required=True)
    recorder = commands.add_parser("record", help="record a finished run")
    recorder.add_argument("run", type=Path)
    recorder.add_argument("name")
    recorder.add_argument("command")
    recorder.add_argument("--note", default="")
    comparer = commands.add_parser("compare", help="record a comparison")
    comparer.add_argument("file", type=Path)
    comparer.add_argument("command")
    comparer.add_argument("--name", default="comparison")
    commands.add_parser("table", help="make the tables of README.md and docs/ anew, and the figures of recipes")
    args = parser.parse_args()
    if args.job == "record":
        print(record(args.run, args.name, args.command, args.note))
    elif args.job == "compare":
        print(record_comparison(args.file, args.command, args.name))
    else:
        for page, text in updated_pages().items():
            page.write_text(text)
        from experiments.recipe_figures import draw_figures  # late: matplotlib

        draw_figures(recipe_tables.queued(), ROOT / "docs")


if __name__ == "__main__":
    main()
