"""docs/lesson.py: the page and the notebook are made from it, and it runs, to an accuracy and to equal bits."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, execute
from PIL import Image

from experiments.lesson_pages import cells, notebook, page


def test_page_and_notebook_are_made_from_it() -> None:
    text = (ROOT / "docs" / "lesson.py").read_text()
    assert (ROOT / "docs" / "lesson.md").read_text() == page(text)
    assert (ROOT / "docs" / "lesson.ipynb").read_text() == notebook(text)


def test_cells_are_prose_and_code_in_turn() -> None:
    assert cells("# %% [markdown]\n# # Head\n#\n# text\n\n# %%\na = 1\n\nb = 2\n") == [
        ("markdown", "# Head\n\ntext"),
        ("code", "a = 1\n\nb = 2"),
    ]


@pytest.mark.thorough
def test_it_runs_as_a_notebook_does(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    book = json.loads((ROOT / "docs" / "lesson.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(code) == 7
    code.append("print('answers', [answer[0][0] for answer in answers])")
    (tmp_path / "lesson.py").write_text("\n".join(code))
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = execute(sys.executable, "lesson.py", env=env, cwd=tmp_path, timeout=550)
    assert done.returncode == 0, done.stderr
    assert "killed: True\nthe same bits: True" in done.stdout
    # The first test images of each label are known by sight: an ankle boot, a pullover.
    assert "answers ['Ankle boot', 'Pullover']" in done.stdout
    assert done.stdout.splitlines()[-3].startswith("Ankle boot ")  # printed by the lesson itself
    for name in ("data", "augmented", "suspects"):
        assert f"see runs/lesson/{name}.png\n" in done.stdout
        with Image.open(tmp_path / f"runs/lesson/{name}.png") as picture:
            assert picture.width > 900
    accuracy = next(line for line in done.stdout.splitlines() if line.endswith("% of 10,000 test images"))
    assert float(accuracy.split()[0]) > 85
