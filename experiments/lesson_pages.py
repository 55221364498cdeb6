"""Make docs/lesson.md and docs/lesson.ipynb from docs/lesson.py: python -m experiments.lesson_pages

The lesson is in the percent format: `# %% [markdown]` begins prose, every line of it behind `# `; `# %%` begins code.
"""

import json
import re
from pathlib import Path

from fmnist.runtime.files import write_atomic

DOCS = Path(__file__).resolve().parent.parent / "docs"


def cells(text: str) -> list[tuple[str, str]]:
    """Return (markdown or code, text) of each cell."""
    found = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        mark, _, body = part.partition("\n")
        if mark.strip() == "[markdown]":
            found.append(
                ("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n")).strip())
            )
        else:
            found.append(("code", body.strip()))
    return found


def page(text: str) -> str:
    """Return the lesson as Markdown."""
    return "\n\n".join(body if kind == "markdown" else f"```python\n{body}\n```" for kind, body in cells(text)) + "\n"


def notebook(text: str) -> str:
    """Return the lesson as a notebook without outputs."""
    made = []
    for number, (kind, body) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": body.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    whole = {"cells": made, "metadata": kernel | {"language_info": {"name": "python"}}}
    return json.dumps(whole | {"nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def main() -> None:
    text = (DOCS / "lesson.py").read_text()
    write_atomic(DOCS / "lesson.md", page(text))
    write_atomic(DOCS / "lesson.ipynb", notebook(text))


if __name__ == "__main__":
    main()
