"""List a folder of pictures by class: ROOT/CLASS/*, or ROOT/{train,val,test}/CLASS/*, and nothing between the two."""

import os
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fmnist.data.photos import OTHER_SUFFIXES, SUFFIXES, is_ours, is_run_directory
from fmnist.runtime.files import cannot_read, reason

PARTS = ("train", "val", "test")
# What other tools call a part: as a class it would be learned, and mean nothing.
SPELLINGS = {name: part for part, names in {
    "train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing"),
}.items() for name in names}  # fmt: skip
# Of archives, disks and network drives; the second holds a thumbnail of each picture beside it.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


class Found(NamedTuple):
    """A picture file.

    Attributes:
        part: train, val or test; empty where the folder has no parts.
        label: the name of its class.
        inner: its path below the folder of its class.
        name: its path below the root, with slashes.
        version: size in bytes, times of the last change of content and of anything, ns: whether it is still the same.
        error: why it cannot be read, where that is known without opening it; else empty.
    """

    part: str
    label: str
    inner: str
    name: str
    version: tuple[int, int, int]
    error: str


class _Folder(NamedTuple):
    folders: list[str]
    pictures: list[tuple[str, tuple[int, int, int], str]]  # name, version, error
    is_run: bool = False  # or holds nothing but what a command of ours drew


def list_pictures(root: Path) -> tuple[list[Found], Counter[str]]:
    """List the pictures of a folder, without opening one.

    Sub-folders of a class belong to it, and links to files and folders are followed. Hidden files, run directories and
    what commands of this project drew are left out.

    Args:
        root: the folder.

    Returns:
        The pictures by part, then by their path inside their class, then by class; and how many other files there are,
        by suffix.

    Raises:
        ValueError: one line: a folder that cannot be read, is met twice, or has neither of the two layouts.
    """
    reader = _Reader(root)
    top = reader.folder("")
    for name, _, error in top.pictures:
        fault = error or "a picture in no class; expected it in the folder of its class"
        raise ValueError(f"{root / name}: {fault}")
    folders = {name: reader.folder(name) for name in top.folders}
    inside = {name: folder for name, folder in folders.items() if not folder.is_run}
    parts = _parts(root, inside)
    if not parts and len(inside) == 1:
        (only,) = inside
        hint = f"; is {root / only} meant?" if inside[only].folders else ""
        raise ValueError(f"{root} holds one class only, {only}; expected a folder a class, two or more{hint}")
    found: list[Found] = []
    for part in parts or ("",):
        below = inside[part].folders if part else list(inside)
        for label in below:
            found += reader.class_(part, label, reader.folder(f"{part}/{label}") if part else inside[label])
    _check_classes(root, found, parts)
    found.sort(key=lambda file: (PARTS.index(file.part) if file.part else 0, file.inner, file.label))
    return found, reader.left_out


def wait_for_another_time(found: list[Found]) -> None:
    """Wait until a file that is written again gets another time: file systems count in 10 ms or less, FAT in 2 s."""
    newest = max(max(file.version[1:]) for file in found)
    age_s, tick_s = abs(time.time_ns() - newest) / 1e9, 0.02 if newest % 10**9 else 2.0
    if age_s < tick_s:
        time.sleep(tick_s)


def _parts(root: Path, inside: dict[str, _Folder]) -> list[str]:
    """Return the folders that are parts; none where all are classes. A folder of folders alone may be a part."""
    spelled = {name: folder for name, folder in inside.items() if name.casefold() in SPELLINGS}
    likely = [name for name, folder in spelled.items() if folder.folders and not folder.pictures]
    if not likely:
        if len({SPELLINGS[name.casefold()] for name, folder in spelled.items() if folder.pictures}) > 1:
            names = " and ".join(str(root / name) for name in spelled)
            raise ValueError(f"{names} hold pictures directly; expected a folder a class in each")
        return []
    for name in likely:
        if name not in PARTS:
            part = SPELLINGS[name.casefold()]
            raise ValueError(f"{root / name} holds folders, as a part of the data set does: call it {part}")
    others = [name for name in inside if name not in likely and (inside[name].folders or inside[name].pictures)]
    for name in others:
        if name in spelled:
            stray = inside[name].pictures[0][0]
            raise ValueError(f"{root / name} holds pictures directly, such as {stray}; expected a folder a class")
    if others:
        raise ValueError(
            f"{root} mixes two layouts: {likely[0]} holds folders, as a part of the data set does, beside "
            f"{others[0]}; expected train, val and test, each with a folder a class, or classes alone"
        )
    if "train" not in likely:
        raise ValueError(f"{root} has {' and '.join(sorted(likely, key=PARTS.index))}, but no train")
    return [name for name in PARTS if name in likely]


def _check_classes(root: Path, found: list[Found], parts: list[str]) -> None:
    first = parts[0] if parts else ""
    labels = {file.label for file in found if file.part == first}
    for file in found:
        if file.label not in labels:
            raise ValueError(
                f"{root / file.part / file.label}: train has no pictures of this class; its classes: "
                f"{', '.join(sorted(labels))[:200] or 'none'}"
            )
    known: dict[str, str] = {}
    for label in sorted(labels):
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in label):
            raise ValueError(
                f"{root}: the class folder {ascii(label):.100} has a control character, or bytes that are no UTF-8, in "
                "its name: rename it"
            )
        other = known.setdefault(unicodedata.normalize("NFC", label).casefold(), label)
        if other != label:
            what = "upper and lower case"
            if unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", label):
                what, other, label = "how Unicode spells their letters", ascii(other), ascii(label)
            raise ValueError(f"{root}: the class folders {other} and {label} differ in {what} only")
    if len(labels) < 2:
        what = f"one class only, {labels.pop()}" if labels else f"no pictures ({', '.join(SUFFIXES)})"
        raise ValueError(f"{root / first} holds {what}; expected a folder a class, two or more")


class _Reader:
    """Reads folders below a root, each once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: Counter[str] = Counter()
        self._seen: dict[str, str] = {}
        self._read: dict[str, _Folder] = {}

    def class_(self, part: str, label: str, top: _Folder) -> list[Found]:
        """Return all pictures of a class, at whatever depth."""
        home = f"{part}/{label}" if part else label
        found, waiting = [], [("", top)]
        while waiting:
            inner, folder = waiting.pop()
            if not inner and (names := [name for name in folder.folders if name.casefold() in SPELLINGS]):
                raise ValueError(
                    f"{self.root / home / names[0]}: a part inside a class; expected {names[0].casefold()}/{label}"
                )
            found += [
                Found(part, label, inner + name, f"{home}/{inner}{name}", version, error)
                for name, version, error in folder.pictures
            ]
            waiting += [(f"{inner}{name}/", self.folder(f"{home}/{inner}{name}")) for name in folder.folders]
        if not found and part in ("", "train") and not top.is_run:
            raise ValueError(f"{self.root / home} holds no pictures ({', '.join(SUFFIXES)}): an empty class")
        return found

    def folder(self, name: str) -> _Folder:
        """Return one folder; a run directory counts as empty, as does a folder that holds nothing but such."""
        if name not in self._read:
            self._read[name] = folder = self._scan(name)
            runs = (
                name and not folder.pictures and all(self.folder(f"{name}/{inner}").is_run for inner in folder.folders)
            )
            if runs and folder.folders:
                self._read[name] = _Folder([], [], is_run=True)
        return self._read[name]

    def _scan(self, name: str) -> _Folder:
        path = self.root / name
        try:
            first = self._seen.setdefault(os.path.realpath(path), name)
            if first != name:
                raise ValueError(f"{path} and {self.root / first} are one folder; a link may not lead to it again")
            with os.scandir(path) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            raise cannot_read(path, error) from None
        if name and is_run_directory({entry.name for entry in entries}):
            self.left_out["made by fmnist"] += len(entries)
            return _Folder([], [], is_run=True)
        folder, ours = _Folder([], []), self.left_out["made by fmnist"]
        for entry in entries:
            self._add(entry, folder)
        only_ours = not folder.folders and not folder.pictures and self.left_out["made by fmnist"] > ours
        return folder._replace(is_run=bool(name) and only_ours)

    def _add(self, entry: os.DirEntry[str], folder: _Folder) -> None:
        version, error = (0, 0, 0), ""
        try:
            status = entry.stat()
            is_folder = entry.is_dir()
            version = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except OSError as failed:
            is_folder, error = False, f"a link to nothing ({reason(failed)})" if entry.is_symlink() else reason(failed)
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            self.left_out["hidden"] += 1
        elif is_folder:
            if entry.name not in SYSTEM_FOLDERS:
                folder.folders.append(entry.name)
        elif suffix in SUFFIXES or suffix in OTHER_SUFFIXES or error:  # a lost link may have been a folder of pictures
            if is_ours(entry.path):
                self.left_out["made by fmnist"] += 1
                return
            if suffix in OTHER_SUFFIXES:
                error = error or f"{suffix} is not read; convert it to JPEG or PNG"
            folder.pictures.append((entry.name, version, error))
        else:
            self.left_out[suffix or "no suffix"] += 1
