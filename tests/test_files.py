"""One writer of whole files, one JSON reader, one CSV writer: each case with its right value."""

import csv
import io
import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from fmnist.runtime.files import LEFTOVER_AGE_S, csv_bytes, read_json, temporary_folder, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("content", "expected"), [(b"\x00\xff", b"\x00\xff"), ("é\n", b"\xc3\xa9\n"), (lambda file: file.write(b"x"), b"x")]
)
def test_bytes_text_and_what_a_function_fills_in(content: object, expected: bytes, tmp_path: Path) -> None:
    write_atomic(tmp_path / "made" / "file", content)  # type: ignore[arg-type]
    assert (tmp_path / "made" / "file").read_bytes() == expected
    assert names(tmp_path / "made") == ["file"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def full_disk(file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(target, full_disk)
    assert target.read_text() == "old" and names(tmp_path) == ["file"]


def test_no_link_is_followed(tmp_path: Path) -> None:
    outside = tmp_path / "notes"
    outside.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").symlink_to(outside)
    (run / ".config.yaml.part").symlink_to(outside)  # the name that earlier versions wrote to first
    write_atomic(run / "config.yaml", "seed: 1\n")
    assert outside.read_text() == "mine"
    assert (run / "config.yaml").read_text() == "seed: 1\n" and not (run / "config.yaml").is_symlink()


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        write_atomic(tmp_path / "shared", "x")
        os.umask(0o077)
        write_atomic(tmp_path / "own", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o664
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600


def test_leftovers_of_killed_writes_go_and_a_write_under_way_stays(tmp_path: Path) -> None:
    stale, ahead = tmp_path / ".a[1].01234567.part", tmp_path / ".a[1].89abcdef.part"
    new, other = tmp_path / ".a[1].00112233.part", tmp_path / ".b.01234567.part"
    for path in (stale, ahead, new, other, tmp_path / ".a[1].mine.part"):
        path.write_text("half")
    for path, seconds in ((stale, -2), (ahead, 7200), (other, -2)):  # the clock may have been set back
        os.utime(path, (path.stat().st_mtime + seconds,) * 2)
    (tmp_path / ".a[1].44556677.part").symlink_to(other)
    folder = tmp_path / ".a[1].fedcba98.part"
    folder.mkdir()
    (folder / "weights").write_text("half")
    os.utime(folder, (0, 0))
    kept = [".a[1].00112233.part", ".a[1].44556677.part", ".a[1].mine.part", ".b.01234567.part"]
    write_atomic(tmp_path / "a[1]", "x")
    assert names(tmp_path) == [*kept, "a[1]"]

    def meanwhile(file: io.BufferedWriter) -> None:
        (part,) = tmp_path.glob(".file.*.part")
        os.utime(part, (0, 0))  # it has been written for long
        write_atomic(tmp_path / "file", "second")
        assert part.exists()
        file.write(b"first")

    write_atomic(tmp_path / "file", meanwhile)
    assert (tmp_path / "file").read_text() == "first"
    assert names(tmp_path) == [*kept, "a[1]", "file"]


def test_without_locks_leftovers_go_by_their_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmnist.runtime.files.fcntl", None)
    for name, age in (("01234567", LEFTOVER_AGE_S + 60), ("89abcdef", 60)):
        path = tmp_path / f".a.{name}.part"
        path.write_text("half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    write_atomic(tmp_path / "a", "x")
    assert names(tmp_path) == [".a.89abcdef.part", "a"]


def test_a_temporary_folder_goes_also_after_a_kill(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "hub") as folder:
        (folder / "weights").write_text("x")
        os.utime(folder, (0, 0))
        with temporary_folder(tmp_path / "hub"):
            assert (folder / "weights").exists()  # another process is at it
    assert names(tmp_path) == []
    child = os.fork()
    if child == 0:
        with temporary_folder(tmp_path / "hub") as folder:
            os.utime(folder, (0, 0))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    with temporary_folder(tmp_path / "hub"):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    texts = [str(i) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomic, args=(tmp_path / "file", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"[" * 5_000, "recursion"),
        (b'{"a": ', "Expecting value"),
        (b"\xff\xfe\x00", "decode"),
    ],
)
def test_what_is_no_json_object_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_pipe_a_folder_and_nothing_are_one_line_and_never_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "not a regular file"), (".", "not a regular file"), ("none", "no such file")):
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / name)


def test_csv_cells_are_no_formulas_and_no_name_breaks_a_line() -> None:
    cells = ['=HYPERLINK("x","y").png', "+1.jpg", "@SUM(1).jpg", "-5", "a\rb\nc", "x\udcff", "plain, quoted", 3, 0.5]
    data = csv_bytes(["cell"], [[cell] for cell in cells])
    rows = [row[0] for row in csv.reader(io.StringIO(data.decode()))]
    assert rows == [
        "cell",
        """'=HYPERLINK("x","y").png""",
        "'+1.jpg",
        "'@SUM(1).jpg",
        "-5",  # a number, not a formula
        r"a\rb\nc",
        r"x\udcff",
        "plain, quoted",
        "3",
        "0.5",
    ]
