"""How a command line names a data set: by `data.name`, by its files, or by a run on it."""

from pathlib import Path

from fmnist.data.fetch import PUBLISHED, missing_files
from fmnist.data.registry import SOURCES
from fmnist.runtime.ownership import CONFIG


def flags_of(named: str) -> list[str]:
    """Return the flags of train.py that open a data set.

    Args:
        named: a name that `data.name` takes, a run directory, a .npz file, or a folder: of Fashion-MNIST's files, or of
            pictures by class.

    Raises:
        ValueError: it is none of them.
    """
    if named in SOURCES:
        return [f"--data.name={named}"]
    path = Path(named).expanduser()
    if (path / CONFIG).is_file():
        return [f"--config={path / CONFIG}"]
    if path.is_file():
        name = "npz"
    elif path.is_dir():
        idx = any(len(missing_files(place)) < len(PUBLISHED) for place in (path, path / "FashionMNIST" / "raw"))
        name = "fashion_mnist" if idx else "folder"
    else:
        raise ValueError(f"{named!r} is no data set; valid: {', '.join(SOURCES)}, a run, a .npz file or a folder")
    return [f"--data.name={name}", f"--data.root={path}"]
