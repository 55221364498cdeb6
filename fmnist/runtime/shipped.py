"""train.py, evaluate.py and configs/: beside the package in a checkout, inside it in a wheel."""

from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
DEFAULT_RECIPE = "configs/cnn.yaml"


def shipped(name: str) -> Path:
    """Return where a file of this project is, e.g. train.py or configs/cnn.yaml."""
    inside = PACKAGE / "shipped" / name
    return inside if inside.exists() else PACKAGE.parent / name


def with_recipe(flags: Sequence[str]) -> list[str]:
    """Return flags of train.py with the default recipe named, and one that is not here replaced by the shipped one."""
    flags, named = list(flags), False
    for i, flag in enumerate(flags):
        name, assigned, value = flag.partition("=")
        if name != "--config" or not (assigned or i + 1 < len(flags)):
            continue
        named = True
        value = value if assigned else flags[i + 1]
        if not Path(value).exists() and shipped(value).is_file():
            flags[i if assigned else i + 1] = f"{'--config=' if assigned else ''}{shipped(value)}"
    return flags if named else ["--config", str(shipped(DEFAULT_RECIPE)), *flags]
