"""Find the folder of Fashion-MNIST, before torch is imported; fetch it only where no folder was named."""

import os
from pathlib import Path

from fmnist.config.shipped import command
from fmnist.data.fetch import DEBIAN_FOLDER, PUBLISHED, STAGING, fetch_files, missing_files
from fmnist.runtime.console import one_line
from fmnist.runtime.environment import ENVIRONMENT

HOME = Path("data/FashionMNIST/raw")  # torchvision's layout, below the working directory
NUM_SHOWN = 4  # names of a folder's content in an error


def locate(root: str | None = None, *, fetch: bool = False) -> Path:
    """Find the folder that holds the four files; with `fetch`, download them where no folder was named.

    A named folder is `root`, else `$FMNIST_DATA`: that of the files or torchvision's root above `FashionMNIST/raw`.
    Nothing is ever written to it. Without one: `data/FashionMNIST/raw`, `data/`, then Debian's folder. The spellings
    that are read: see `find_file`.

    Args:
        root: `data.root` of the config.
        fetch: Fill `data/FashionMNIST/raw` if no folder was named and none holds the files.

    Returns:
        The folder. The content of the files is not checked.

    Raises:
        ValueError: If the files are not there, are incomplete, or cannot be fetched; one line.
    """
    named = root or ENVIRONMENT.get("FMNIST_DATA")
    origin = "data.root" if root else "$FMNIST_DATA" if named else "data"
    home = Path(os.path.expanduser(named)) if named else Path.cwd() / "data"
    raw = home / "FashionMNIST" / "raw"
    try:
        for folder in (raw, home) if named else (raw, home, DEBIAN_FOLDER):
            if not missing_files(folder):
                return folder
        for folder in (raw, home):
            if not 0 < len(missing_files(folder)) < len(PUBLISHED):
                continue
            if not named and (folder / STAGING).is_dir():
                continue  # a fetch is under way there, or was killed between two renames
            # Look again: another process may have completed its fetch since.
            if not (missing := missing_files(folder)):
                return folder
            raise ValueError(f"{origin}: {folder} lacks {', '.join(missing)} (plain or .gz), but holds the others")
        if named:
            raise ValueError(_refusal(origin, home))
        if not fetch:
            raise ValueError(
                f"data: no Fashion-MNIST in {HOME}, data or {DEBIAN_FOLDER}, and only train.py fetches it: run "
                f"{command('train')} --dry_run, or name the folder that holds it: --data.root FOLDER"
            )
        fetch_files(raw)
    except OSError as error:  # no folder, a name too long, no rights, a full disk
        if named:
            raise ValueError(_refusal(origin, home)) from error
        raise ValueError(f"data: Fashion-MNIST cannot be fetched into {raw}: {one_line(error)}") from error
    return raw


def _refusal(origin: str, folder: Path) -> str:
    """Say what was expected, what was found, and the way out."""
    try:
        names = sorted(os.listdir(folder))
        more = f" and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
        found = ", ".join(one_line(name, 60) for name in names[:NUM_SHOWN]) + more if names else "nothing"
    except FileNotFoundError:
        found = "no such folder"
    except (OSError, ValueError) as error:  # a file, a circle of links, a name too long, a NUL in the name
        found = one_line(getattr(error, "strerror", None) or error)
    way_out = "leave data.root out" if origin == "data.root" else "unset FMNIST_DATA"
    return one_line(
        f"{origin}: no Fashion-MNIST in {folder}: expected {', '.join(PUBLISHED)} (plain or .gz), found {found}; "
        f"{way_out} and train.py fetches it into {HOME}",
        1500,
    )
