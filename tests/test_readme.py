"""What README says is so: its commands, its options, its table."""

import re
import sys
from pathlib import Path

import pytest

from fmnist.checkpoint.run_directory import RUN_FILES
from fmnist.config.schema import Config, flatten

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "benchmarks"))


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
    recipes = re.findall(r"^\| `(\w+\.yaml)`", README.split("## Recipes")[1], re.M)
    assert sorted(recipes) == sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    for name in ("config.yaml", "metrics.jsonl", "model.safetensors", "summary.json", "learning_curves.png"):
        assert name in RUN_FILES
        assert f"`{name}`" in README


def test_the_tables_are_those_of_the_recorded_results() -> None:
    import results

    for page, text in results.updated_pages().items():
        assert text == page.read_text(), page
    assert results.table().count("**") >= 2 * 3  # three recipes at least, their accuracy in bold
    for path in results.RESULTS.glob("*.json"):
        text = path.read_text()
        for key in ("command", "date", "hardware", "versions", "git_revision"):
            assert f'"{key}"' in text, path
