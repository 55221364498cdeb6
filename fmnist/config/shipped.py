"""train.py, evaluate.py and configs/: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Return where a file of this project is, e.g. train.py or configs/cnn.yaml."""
    inside = PACKAGE / "shipped"
    return (inside if inside.is_dir() else PACKAGE.parent) / name


def command(name: str) -> str:
    """Return how one types a command here: fmnist NAME of a wheel, else python train.py or python -m fmnist NAME."""
    if (PACKAGE / "shipped").is_dir():
        return f"fmnist {name}"
    return f"python {name}.py" if name in ("train", "evaluate") else f"python -m fmnist {name}"


def find_recipe(name: str) -> Path:
    """Return a config file as it is named; configs/NAME.yaml that is not here is the shipped recipe."""
    path = Path(name)
    return shipped(name) if path.parent == Path("configs") and not path.exists() else path
