"""What README says is so: its commands, its options, its table."""

import re
from pathlib import Path
from typing import Any

import pytest

from experiments import tables
from fmnist.checkpoint.run_directory import RUN_FILES
from fmnist.config.schema import Config, flatten

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["train", "test"])
def test_each_of_the_two_commands_is_one_line(name: str) -> None:
    block = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.S)
    assert block is not None
    assert block[1].count("\n") == 1
    assert "requirements" in block[1]


def test_every_option_and_file_that_it_names_exists() -> None:
    options = set(flatten(Config()))
    named = set(re.findall(r"--((?:data|batch|augment|model|optim|schedule|evaluation|checkpoint|log)\.\w+)", README))
    assert named
    assert named <= options
    for path in re.findall(r"\]\(([\w/]+\.png)\)", README):
        assert (ROOT / path).stat().st_size > 10_000
    recipes = set(re.findall(r"`(\w+\.yaml)`", README.split("## Recipes")[1])) - {"config.yaml"}
    assert sorted(recipes) == sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    for name in ("config.yaml", "metrics.jsonl", "model.safetensors", "summary.json", "learning_curves.png"):
        assert name in RUN_FILES
        assert f"`{name}`" in README


def test_it_is_a_door_and_no_manual() -> None:
    assert README.count("\n") <= 150


def test_the_data_path_in_your_own_loop_runs() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    block = re.search(r"```python\n(import torch\n.*?import fmnist\.data\n.*?)```", page, re.S)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1].replace('"train"', '"test"'), names)  # 10,000 images: a sixth of the time
    assert names["images"].shape == (256, 1, 28, 28) and names["images"].device.type == "cpu"
    # ln 10 = 2.30 before the first step; a linear classifier of Fashion-MNIST comes to about 0.45 in many epochs
    assert 0.3 < names["loss"].item() < 1.8, names["loss"]


def test_it_shows_the_loop_of_train_py() -> None:
    shown = re.search(r"<!-- loop: begin -->\n```python\n(.*?)\n```\n<!-- loop: end -->", README, re.S)
    assert shown is not None
    assert shown[1].startswith("def train(") and "while state.step < schedule.total_steps:" in shown[1]
    assert f"\n{shown[1]}\n" in (ROOT / "train.py").read_text()


def test_the_tables_are_those_of_the_recorded_results() -> None:
    for page, text in tables.updated_pages().items():
        assert text == page.read_text(), f"{page}: run python -m experiments.tables table"
    assert tables.results_table().count("**") >= 2 * 3  # three recipes at least, their accuracy in bold
    results = sorted(tables.RESULTS.glob("*.json"))
    assert "cnn.json" in [path.name for path in results]
    for path in results:
        text = path.read_text()
        for key in ("command", "date", "hardware", "versions", "git_revision"):
            assert f'"{key}"' in text, path
