"""A disk that fails or dies at any operation one chooses, and that can lose what was not synced.

`Disk` stands between Python and the file system: each operation that changes a file below `root` is one event. At the
chosen event it raises (a full disk) or freezes the disk as SIGKILL would leave it: what runs after changes nothing.
`replay` applies the events to a model in which only what was fsynced is certain, and `left_after` loses the rest.
"""

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """What a frozen disk raises: no handler of ours may swallow it."""


@dataclass
class Disk:
    """Count the events below root, and fail at one of them.

    Attributes:
        root: only changes below it are events.
        at: the event that fails, from 0; None: none does.
        kill: freeze the disk there instead of raising OSError.
        events: (operation, path, other path or content).
    """

    root: Path
    at: int | None = None
    kill: bool = False
    events: list[tuple[str, Path, Any]] = field(default_factory=list)
    dead: bool = False

    def event(self, operation: str, path: Path, extra: Any = None, partly: Callable[[], None] = lambda: None) -> None:
        if self.dead:
            raise Killed
        if len(self.events) == self.at:
            self.at = None
            partly()  # half of a write arrives
            if self.kill:
                self.dead = True
                raise Killed
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self.events.append((operation, path, extra))

    def below(self, path: Any, dir_fd: int | None = None) -> Path | None:
        """Return the absolute path if it lies below root."""
        if isinstance(path, int):
            return None
        base = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) if dir_fd is not None else Path.cwd()
        whole = Path(os.path.normpath(base / os.fspath(path)))
        return whole if whole.is_relative_to(self.root) else None


class File:
    """A file whose writes arrive when it is flushed or closed, and not before: Python's buffer may hold them back."""

    def __init__(self, disk: Disk, path: Path, file: Any) -> None:
        self.disk, self.path, self.file = disk, path, file
        self.held: list[Any] = []

    def write(self, data: Any) -> int:
        self.held.append(data if isinstance(data, str) else bytes(data))
        return len(self.held[-1])

    def flush(self) -> None:
        if self.held:
            data, self.held = type(self.held[0])().join(self.held), []

            def half() -> None:
                self.file.write(data[: len(data) // 2])
                self.file.flush()

            self.disk.event("write", self.path, data, half)
            self.file.write(data)
        self.file.flush()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.file.close()

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name in ("seek", "tell", "truncate", "read"):
            self.flush()
        return getattr(self.file, name)


@contextmanager
def installed(disk: Disk) -> Iterator[Disk]:
    """Put the disk between Python and the file system."""
    with pytest.MonkeyPatch.context() as patch:
        real_os_open = os.open
        real_open, real_fsync = io.open, os.fsync

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            path = disk.below(file)
            if path is None or mode[0] == "r":
                return real_open(file, mode, *args, **kwargs)
            disk.event("create" if mode[0] in "wx" else "append", path)
            return File(disk, path, real_open(file, mode, *args, **kwargs))

        def os_open(file: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            writes = os.O_CREAT | os.O_WRONLY | os.O_RDWR
            if flags & writes and (path := disk.below(file)) is not None:
                disk.event("append", path)
            return real_os_open(file, flags, *args, **kwargs)

        def fsync(descriptor: int) -> None:
            path = disk.below(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path is not None:
                disk.event("fsync", path)
            real_fsync(descriptor)

        def one_path(name: str) -> None:
            real = getattr(os, name)

            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                whole = disk.below(path, kwargs.get("dir_fd"))
                if whole is not None and whole.exists() != (name == "mkdir") and whole.parent.is_dir():
                    disk.event(name, whole)
                return real(path, *args, **kwargs)

            patch.setattr(os, name, call)

        def two_paths(name: str) -> None:
            real = getattr(os, name)

            def call(source: Any, target: Any, **kwargs: Any) -> None:
                if (whole := disk.below(source)) is not None:
                    disk.event("rename", whole, disk.below(target))
                real(source, target, **kwargs)

            patch.setattr(os, name, call)

        for name in ("mkdir", "unlink", "rmdir"):
            one_path(name)
        two_paths("rename")
        two_paths("replace")
        patch.setattr(io, "open", open_)
        patch.setattr(builtins, "open", open_)
        patch.setattr(os, "open", os_open)
        patch.setattr(os, "fsync", fsync)
        yield disk


_audited: list[tuple[str, Any]] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _audited is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return
    if event in ("os.remove", "os.mkdir") and args[-1] == -1 and os.path.exists(args[0]) == (event == "os.mkdir"):
        return  # a directory that is there, a file that is not: nothing changes
    _audited.append((event, args))


def audited(action: Callable[[], object], root: Path) -> int:
    """Count, by the interpreter's own audit events, the operations that change names or open files to write."""
    global _audited
    if not getattr(audited, "hooked", False):
        sys.addaudithook(_hook)
        audited.hooked = True  # type: ignore[attr-defined]
    _audited = []
    try:
        action()
    finally:
        seen, _audited = _audited, None
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    count = 0
    for event, args in seen:
        relative = event != "open" and len(args) > 1 and isinstance(args[-1], int) and args[-1] >= 0  # rmtree's dir_fd
        inside = relative or str(args[0]).startswith(str(root))
        count += inside and (event != "open" or bool(args[2] & writes))
    return count


# --- power loss ------------------------------------------------------------------------------------------------------


class Node:
    """A file (entries None) or directory as it is now, and as it is certain to be after a power loss."""

    def __init__(self, *, directory: bool, data: bytes = b"") -> None:
        self.entries: dict[str, Node] | None = {} if directory else None
        self.data, self.durable_data = data, b""
        self.durable_entries: dict[str, Node] = {}

    def settle(self) -> None:
        """Make everything here certain, as after a long time."""
        self.durable_data = self.data
        if self.entries is not None:
            for node in self.entries.values():
                node.settle()
            self.durable_entries = dict(self.entries)


def read_tree(path: Path) -> Node:
    """Take a directory from the real disk, all of it certain."""
    if path.is_dir():
        node = Node(directory=True)
        node.entries = {child.name: read_tree(child) for child in path.iterdir()}
    else:
        node = Node(directory=False, data=path.read_bytes())
    node.settle()
    return node


def replay(tree: Node, root: Path, events: list[tuple[str, Path, Any]]) -> None:
    """Apply events to the model."""

    def find(path: Path) -> Node:
        node = tree
        for part in path.relative_to(root).parts:
            assert node.entries is not None
            node = node.entries[part]
        return node

    for operation, path, extra in events:
        if operation == "fsync":
            node = find(path)
            node.durable_data = node.data
            node.durable_entries = dict(node.entries or {})
            continue
        parent = find(path.parent).entries
        assert parent is not None
        if operation == "mkdir":
            parent[path.name] = Node(directory=True)
        elif operation == "create":
            if path.name in parent:
                parent[path.name].data = b""
            else:
                parent[path.name] = Node(directory=False)
        elif operation == "write":
            parent[path.name].data += extra.encode() if isinstance(extra, str) else extra
        elif operation == "rename":
            target = find(extra.parent).entries
            assert target is not None
            target[extra.name] = parent.pop(path.name)
        elif operation in ("unlink", "rmdir"):
            del parent[path.name]
        else:
            assert operation == "append"
            parent.setdefault(path.name, Node(directory=False))


LOSSES = [(names, data) for names in ("certain", "now", "both", "either") for data in ("certain", "now")]


Tree = dict[str, Any]  # names to content, or to the tree of a directory


def left_after(node: Node, names: str, data: str) -> Tree:
    """Return one of the trees that a power loss may leave.

    Args:
        node: the model.
        names: which directory entries survive: certain ones, those of now, those in both, those in either. A name that
            was given to another file belongs to one of the two.
        data: which content: certain, or that of now; where a name may be of two files, which of them.
    """
    now, certain = node.entries or {}, node.durable_entries
    either = certain | now if data == "now" else now | certain
    both = {name: either[name] for name in now if name in certain}
    entries = {"certain": certain, "now": now, "both": both, "either": either}[names]
    return {
        name: left_after(child, names, data)
        if child.entries is not None
        else (child.durable_data if data == "certain" else child.data)
        for name, child in entries.items()
    }


def write_tree(tree: Tree, target: Path) -> None:
    """Write a tree to a new directory."""
    target.mkdir()
    for name, child in tree.items():
        if isinstance(child, dict):
            write_tree(child, target / name)
        else:
            (target / name).write_bytes(child)
