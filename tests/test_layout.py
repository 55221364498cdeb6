"""Who may import whom, what has one home, and that the loop stays short: rules of CONTRIBUTING.md, read off the syntax.

Modules are grouped into rooms: a folder of fmnist/, or one of its own files. A room may import those named in ROOMS and
nothing else of ours; each stands in the table below all that it may import, so there is no circle.
"""

import ast
import functools
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# By floor, from the ground up: room -> rooms it may import. No two rooms of a floor import each other.
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "runtime": set(),
    "data": {"config", "runtime"},
    "models": {"config", "runtime"},
    "checkpoint": {"config", "runtime"},
    "tracking": {"config", "runtime"},
    "step": {"config", "data", "runtime"},
    "metrics": {"config", "data", "runtime"},
    "optim": {"config", "models", "runtime"},
    "network": {"config", "data", "models", "runtime"},
    "run": {"checkpoint", "config", "runtime", "tracking"},
    "trained": {"checkpoint", "config", "data", "models", "network", "runtime"},
    "evaluation": {"config", "data", "metrics", "models", "runtime", "trained"},
    "report": {"config", "evaluation", "runtime", "tracking"},
    "training": {
        *("checkpoint", "config", "data", "evaluation", "metrics", "models", "network", "optim", "report", "run"),
        *("runtime", "tracking"),
    },
    "apps": {"checkpoint", "config", "data", "evaluation", "models", "report", "runtime", "tracking", "trained"},
    "benchmark": {"config", "data", "models", "network", "optim", "report", "runtime", "step"},
    "train.py": {"checkpoint", "config", "metrics", "optim", "run", "runtime", "step", "training"},
    "evaluate.py": {"evaluation", "report", "runtime", "trained"},
    "experiments": {"apps", "benchmark", "config", "data", "models", "optim", "report", "runtime", "trained"},
}
FLOORS = (
    {"config", "runtime"},
    {"data", "models", "checkpoint", "tracking"},
    {"step", "metrics", "optim", "network", "run"},
    {"trained"},
    {"evaluation"},
    {"report"},
    {"training", "apps", "benchmark", "evaluate.py"},
    {"train.py", "experiments"},
)
# What an outside library, or a part of the standard one, is used through.
HOMES: dict[str, set[str]] = {
    "accelerate": {"fmnist/runtime/compute.py"},
    "wandb": {"fmnist/tracking/wandb_run.py"},
    "triton": {
        *("fmnist/data/augment_triton.py", "fmnist/models/depthwise_kernels.py", "fmnist/models/depthwise_triton.py"),
        "experiments/depthwise_gpu.py",
    },
    "signal.signal": {
        *(f"fmnist/runtime/{name}.py" for name in ("console", "interrupts", "stop_vote")),
        "experiments/queue.py",
    },
    "os.environ": {"fmnist/runtime/environment.py"},
    "os.getenv": set(),
    "matplotlib": {"fmnist/report/figures.py", "experiments/drawn_pictures.py", "experiments/scaling.py"},
}
# These may not be imported, not even late, by what decides before torch is there.
LIGHT = (
    *("config", "runtime/arguments.py", "runtime/console.py", "runtime/files.py", "runtime/launcher.py"),
    *("runtime/provenance.py", "evaluation/options.py", "__init__.py", "__main__.py"),
    *(f"apps/{name}/__main__.py" for name in ("audit", "data", "export", "monitor", "predict", "search")),
    *(f"apps/{name}.py" for name in ("checkpoints", "doctor", "duplicates", "launch")),
)


@functools.cache
def sources() -> list[tuple[str, ast.Module]]:
    """Return every product file's path below the root, and its syntax tree."""
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("fmnist/**/*.py"), *ROOT.glob("experiments/*.py")])
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in paths]


def room(path: str) -> str:
    """Return the room of a file: train.py -> train.py, fmnist/data/idx.py -> data, fmnist/step.py -> step."""
    first, *rest = Path(path).parts
    return (rest[0].removesuffix(".py") if first == "fmnist" else first) if rest else first


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield dotted names of the modules that a file imports, late imports too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def arrows() -> list[tuple[str, str, str]]:
    """Return each import of one of our rooms by another: file, its room, the room imported."""
    found = []
    for path, tree in sources():
        for name in imported(tree):
            first, _, rest = name.partition(".")
            target = {"fmnist": rest.partition(".")[0], "experiments": "experiments", "train": "train.py"}.get(first)
            if target and target != room(path) and path not in ("fmnist/__init__.py", "fmnist/__main__.py"):
                found.append((path, room(path), target))
    return found


def test_rooms_import_only_what_stands_below_them() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert floor.keys() == ROOMS.keys()
    for name, allowed in ROOMS.items():
        assert all(floor[target] < floor[name] for target in allowed), name
    seen = Counter((start, target) for _, start, target in arrows())
    wrong = [(path, target) for path, start, target in arrows() if target not in ROOMS.get(start, set())]
    assert not wrong
    assert len(seen) <= 90  # arrows between rooms; each is one more thing to know


def test_what_evaluate_reaches_trains_nothing() -> None:
    reached, waiting = set(), {"evaluate.py"}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= {target for _, start, target in arrows() if start == name} - reached
    assert not reached & {"run", "step", "optim", "training", "apps", "train.py"}


def test_apps_share_views_cutout_novelty_and_trust_and_nothing_else() -> None:
    shared = {"views", "cutout", "novelty", "trust"}
    for path, tree in sources():
        if room(path) != "apps":
            continue
        own = Path(path).parts[2].removesuffix(".py")
        for name in imported(tree):
            if name.startswith("fmnist.apps."):
                assert name.split(".")[2] in shared | {own}, (path, name)


def test_each_outside_thing_has_one_home() -> None:
    found: dict[str, set[str]] = {name: set() for name in HOMES}
    for path, tree in sources():
        names = {name.partition(".")[0] for name in imported(tree)}
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(imported(tree))
        for name, users in found.items():
            if name in names or name in used:
                users.add(path)
    assert found == HOMES


def test_the_ground_needs_no_torch() -> None:
    for path, tree in sources():
        if path.removeprefix("fmnist/").startswith(LIGHT):
            top = ast.Module(
                body=[node for node in tree.body if not isinstance(node, ast.FunctionDef)], type_ignores=[]
            )
            heavy = {name.partition(".")[0] for name in imported(top)} & {"torch", "timm", "matplotlib", "scipy"}
            assert not heavy, (path, heavy)


def test_computing_and_writing_are_apart() -> None:
    for path, tree in sources():
        names = set(imported(tree))
        if room(path) == "evaluation":
            assert not any(name.startswith("matplotlib") for name in names), path
        if room(path) in ("config", "evaluation"):
            calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
            assert not any(call.endswith(("write_text", "write_bytes")) for call in calls), path


def test_few_files_know_ranks_or_name_a_device() -> None:
    for path, _ in sources():
        text = (ROOT / path).read_text()
        if not path.startswith("fmnist/runtime/") and path != "fmnist/data/batches.py":
            assert "is_main_process" not in text, path
            assert ".rank ==" not in text, path
            assert '"cuda"' not in text, path


def test_no_two_files_and_no_two_classes_share_a_name() -> None:
    files = Counter(Path(path).name for path, _ in sources() if Path(path).name[:2] != "__")
    assert [name for name, count in files.items() if count > 1] == []
    classes = Counter(node.name for _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []


@pytest.mark.parametrize(("path", "name", "limit"), [("train.py", "train", 40), ("fmnist/step.py", "train_step", 20)])
def test_the_loop_and_the_step_stay_short_enough_to_read(path: str, name: str, limit: int) -> None:
    tree = ast.parse((ROOT / path).read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    first = function.body[1]  # after the docstring
    lines = (ROOT / path).read_text().splitlines()[first.lineno - 1 : function.end_lineno]
    assert len([line for line in lines if line.strip()]) <= limit


def test_the_wheel_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("fmnist/**/__init__.py")}
    assert {name for name in listed if not name.startswith("fmnist.shipped")} == there
