"""train.py, evaluate.py and configs/: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Return where a file of this project is, e.g. train.py or configs/cnn.yaml."""
    inside = PACKAGE / "shipped"
    return (inside if inside.is_dir() else PACKAGE.parent) / name


def command(name: str) -> str:
    """Return how one calls train or evaluate here: python train.py in a checkout, fmnist train of a wheel."""
    return f"fmnist {name}" if (PACKAGE / "shipped").is_dir() else f"python {name}.py"


def find_recipe(name: str) -> Path:
    """Return a config file as it is named; configs/NAME.yaml that is not here is the shipped recipe."""
    path = Path(name)
    return shipped(name) if path.parent == Path("configs") and not path.exists() else path
