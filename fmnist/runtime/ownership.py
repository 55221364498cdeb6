"""What is ours, and so may be deleted or replaced: the files of a run, and a command's own earlier output.

A run directory's files are ours by their names, and a file that a command made elsewhere by a mark in it. Everything
else belongs to somebody: it is named and left alone.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from fmnist.runtime.files import open_regular, reason

CONFIG = "config.yaml"
# Everything a run writes into its directory; config.yaml goes last, because it says whose the rest is.
RUN_FILES = (
    "metrics.jsonl",
    "checkpoints",
    "model.safetensors",
    "summary.json",
    "fingerprint.json",
    "data.json",
    "train.log",
    "learning_curves.png",
    "train_batch.png",
    "features",
    "profile",
    "evaluation",
    "wandb",
    "wandb_run_id",
    "REQUEUE",
    "non_finite_step_*.png",
    CONFIG,
)
EVALUATION = {  # and what tells each file of an evaluation from somebody else's of its name
    "metrics.json": b'"top1_interval"',
    "report.txt": b": top1 ",
    "predictions.csv": b"index,label,prediction,confidence,",
    "confusion_matrix.png": b"",
    "reliability.png": b"",
    "report.html": b"This page holds everything it shows",
    "retrieval.json": b'"num_queries"',
}
# What lies in its folders, a part of the path at a time; ** is all that is below. The client of Weights & Biases puts
# the run's id behind its names.
STEPS, HEX = tuple(f"{kind}_{'[0-9]' * 8}" for kind in ("step", "best")), "[0-9a-f]" * 8
CHECKPOINT_FILES = ("manifest.json", "state.json", *(f"{name}.safetensors" for name in ("model", "optimizer", "ema")))
REPORTS = tuple(
    f"{split}{data}/{name}" for split in ("train", "val", "test") for data in ("", f"-{HEX}") for name in EVALUATION
)
FEATURES = ("train", "val", "test", "train_sample", "val_sample", "train_held_out_sample")
INSIDE = (
    *(f"checkpoints/{step}/{name}" for step in STEPS for name in CHECKPOINT_FILES),
    *(f"checkpoints/.part_{old}{step}/**" for step in STEPS for old in ("", "old_")),
    *(f"features/{folder}{name}.safetensors" for folder in ("", *(f"{step}/" for step in STEPS)) for name in FEATURES),
    *("profile/table.txt", "profile/trace.json"),
    *(f"evaluation/{folder}{report}" for folder in ("", *(f"{step}/" for step in STEPS)) for report in REPORTS),
    *("wandb/*run-*-{run_id}/**", "wandb/latest-run", "wandb/debug*.log"),
    *(f"{folders}.*.{HEX}.part" for folders in ("*/", "*/*/", "*/*/*/")),
)
RUN_MARKS = ("metrics.jsonl", "checkpoints", "summary.json")  # beside a config.yaml; a hub folder has none of them
NOBODYS = (".lock", ".DS_Store", "Thumbs.db", "desktop.ini", ".nfs*")  # of the system: neither a run nor in its way
# Where a file begins or ends with one of these, by its suffix, fmnist made it.
MARKS = {".png": b"Software\x00fmnist", ".onnx": b"weights_sha256", ".safetensors": b"weights_sha256"}
MARKED_BYTES = 1 << 16
MAX_HEADER = 100 << 20  # of safetensors


def listing(folder: Path) -> list[str]:
    """Return the names in a folder, those of the system apart; none where there is no such folder.

    Raises:
        ValueError: it is a file, or may not be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {reason(error)}") from None
    return sorted(name for name in names if not _like(name, NOBODYS))


def run_files(directory: Path) -> list[str]:
    """Return the names in a directory that a run writes."""
    return [name for name in listing(directory) if _like(name, RUN_FILES)]


def foreign_file(directory: Path) -> Path | None:
    """Return one file in the folders of a run that the run did not write; None where all are its own."""
    return next((path for path, ours in _walk(directory) if not ours), None)


def delete_run_files(directory: Path) -> None:
    """Delete what the run in a directory wrote, and nothing else; config.yaml last: a kill leaves the rest ours."""
    for path, ours in sorted(_walk(directory), key=lambda found: found[0].name == CONFIG):
        if ours:
            path.unlink(missing_ok=True)
    for name in run_files(directory):
        if (directory / name).is_dir():
            for folder, _, _ in os.walk(directory / name, topdown=False):
                if not os.listdir(folder):
                    os.rmdir(folder)


def delete_reports(directory: Path) -> bool:
    """Delete the evaluations of the weights that a run uses, those of its checkpoints apart; say whether it had any."""
    patterns = [f"evaluation/{report}" for report in REPORTS]
    reports = [path for path, _ in _walk(directory) if _fits(path.relative_to(directory).parts, patterns)]
    for path in reports:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in reports}:
        if not os.listdir(folder):
            folder.rmdir()
    return bool(reports)


def _walk(directory: Path) -> Iterator[tuple[Path, bool]]:
    """Yield each file and link among a run's, and whether the run wrote it."""
    try:
        run_id = (directory / "wandb_run_id").read_text(errors="replace").strip()
    except OSError:
        run_id = ""
    if not re.fullmatch(r"[\w-]+", run_id):  # no pattern may come from a file
        run_id = "none"
    inside = [pattern.replace("{run_id}", run_id) for pattern in INSIDE]
    for name in run_files(directory):
        top = directory / name
        if top.is_symlink() or not top.is_dir():
            yield top, True
            continue
        for folder, folders, files in os.walk(top):
            links = [entry for entry in folders if (Path(folder) / entry).is_symlink()]
            for entry in (*files, *links):
                path = Path(folder) / entry
                yield path, _like(entry, NOBODYS) or _fits(path.relative_to(directory).parts, inside)


def _fits(path: tuple[str, ...], patterns: Iterable[str]) -> bool:
    for pattern in patterns:
        *folders, last = pattern.split("/")
        below = last == "**" and len(path) > len(folders)
        named = len(path) == len(folders) + 1 and fnmatchcase(path[-1], last)
        if (below or named) and all(map(fnmatchcase, path, folders)):
            return True
    return False


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def run_around(path: Path) -> Path | None:
    """Return the run directory that a path lies in, links followed; None where it lies in none."""
    for folder in path.resolve().parents:
        if (folder / CONFIG).is_file() and any((folder / name).exists() for name in RUN_MARKS):
            return folder
    return None


def check_outputs(marks: Mapping[Path, bytes], *, force: bool = False) -> None:
    """Refuse to write where that would replace a file of a run, or one that this command did not make.

    Args:
        marks: each file that will be written, and what one that this command made begins or ends with; empty: what
            MARKS has for its suffix.
        force: replace other files too, but never those of a run.

    Raises:
        ValueError: one line naming the file, or a folder that cannot be written.
    """
    for path, mark in marks.items():
        if (run := run_around(path)) is not None:
            first = path.resolve().relative_to(run).parts[0]
            if _like(first, RUN_FILES) and first != "evaluation":
                raise ValueError(f"--output: {path} is a file of the run in {run}; give another place")
            if path.name == CONFIG and first != "export":
                raise ValueError(f"--output: {path} lies in the run {run}; valid inside a run: {run / 'export'}")
            if first in ("evaluation", "export", "search", "audit"):
                continue  # what lies there, commands made
        if path.is_dir() and not path.is_symlink():
            raise ValueError(f"--output: {path} is a folder; a file is written there")
        if os.path.lexists(path) and not force and not bears(path, mark or MARKS[path.suffix.lower()]):
            raise ValueError(f"--output: {path} was not made by this command; give another place, or --force")
    for folder in {path.parent for path in marks}:
        check_writable(folder)


def check_suffix(path: Path, suffix: str) -> None:
    """Refuse an output whose name says that it is something else: `suffix` for a file, empty for a folder."""
    found = path.suffix.lower()
    if suffix and found != suffix:
        raise ValueError(f"--output is {path}; valid: a name that ends in {suffix}")
    if not suffix and found in (".csv", ".png", ".json", ".jsonl", ".txt", ".html", ".onnx", ".safetensors", ".yaml"):
        raise ValueError(f"--output is {path}; valid: a folder, in which the files have names of their own")
    if not suffix and path.exists() and not path.is_dir():
        raise ValueError(f"--output is {path}, which is a file; valid: a folder")


def check_place(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that is there.

    Raises:
        ValueError: it cannot be made, or files that are made there could not be read back by their own owner.
    """
    if folder.parts[:1] and folder.parts[0].startswith("~"):
        raise ValueError(f"{folder} would be a folder called {folder.parts[0]}: give the path that ~ stands for")
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        kind = "a link to nothing" if place.is_symlink() and not place.exists() else "not a folder"
        raise ValueError(f"{folder} cannot be made: {place} is {kind}" if place != folder else f"{folder} is {kind}")
    mask = os.umask(0o077)  # there is no way to read it but to set it
    os.umask(mask)
    if mask & 0o700:
        raise ValueError(f"umask is {mask:04o}, which takes files from their own owner; valid: 0000 to 0077")
    return place


def check_writable(folder: Path, option: str = "--output") -> None:
    """Refuse a folder that cannot be made or written, before anything is computed for it.

    Args:
        folder: to be written.
        option: the flag that names another one.

    Raises:
        ValueError: one line naming it.
    """
    place = check_place(folder)
    try:
        if not os.access(place, os.W_OK | os.X_OK):  # false on a read-only disk too
            (place / ".probe").mkdir()  # to hear why
            (place / ".probe").rmdir()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {reason(error)}; {option} names another place") from None


def remove_own(path: Path) -> None:
    """Remove a file that a command made earlier, where it is no longer of what stands beside it; no other."""
    if bears(path, MARKS[path.suffix]):
        path.unlink()


def bears(path: Path, mark: bytes) -> bool:
    """Say whether a file that can be read begins or ends with a mark, in its first or last MARKED_BYTES.

    Of safetensors the whole header begins it, in which the library puts what is said in any order.
    """
    try:
        with open_regular(path) as file:
            head = file.read(MARKED_BYTES)
            if path.suffix.lower() == ".safetensors":
                head += file.read(max(0, min(int.from_bytes(head[:8], "little"), MAX_HEADER) + 8 - MARKED_BYTES))
            file.seek(max(0, os.fstat(file.fileno()).st_size - MARKED_BYTES))
            return mark in head or mark in file.read()
    except OSError:
        return False
