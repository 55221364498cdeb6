"""One writer of whole files, one JSON reader, one CSV writer: each case with its right value."""

import argparse
import csv
import errno
import io
import os
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from disk import Disk, installed
from small import command

from fmnist.apps.monitor.__main__ import main as monitor_main
from fmnist.apps.monitor.batch import read_batch
from fmnist.config.parse import parse_config
from fmnist.data.fashion_mnist import CLASS_NAMES, INFO
from fmnist.evaluation.findings import findings
from fmnist.evaluation.outcome import Outcome
from fmnist.report.write import write_evaluation
from fmnist.runtime.arguments import number
from fmnist.runtime.files import LEFTOVER_AGE_S, csv_bytes, read_json, temporary_folder, write_atomic
from fmnist.tracking.metrics_file import read_metrics, truncate_metrics


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


def test_a_full_disk_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    def fails(error: OSError) -> OSError:
        def fill(file: io.BufferedWriter) -> None:
            raise error

        with pytest.raises(OSError) as caught:
            write_atomic(tmp_path / "file", fill)  # type: ignore[arg-type]
        return caught.value

    full = fails(OSError(errno.ENOSPC, "No space left on device"))
    assert str(full) == f"[Errno 28] No space left on device: '{tmp_path / 'file'}'" and full.errno == errno.ENOSPC
    for other in (OSError("broken data stream"), FileNotFoundError(errno.ENOENT, "No such file", "picture")):
        assert fails(other) is other  # what has no number, or names its own file, is as it was


def test_its_content_is_on_the_disk_before_its_name(tmp_path: Path) -> None:
    with installed(Disk(tmp_path)) as disk:
        write_atomic(tmp_path / "file", "short enough for a buffer")
    assert [operation for operation, *_ in disk.events] == ["create", "write", "fsync", "rename", "fsync"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes")
def test_a_full_disk_that_takes_not_a_byte_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    code = (
        "import resource, signal\nfrom pathlib import Path\nfrom fmnist.runtime.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"try:\n    write_atomic(Path({str(target)!r}), 'new')\nexcept OSError as error:\n    raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 3
    assert target.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_file_system_that_syncs_no_directory_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "file", "x")
    assert (tmp_path / "file").read_text() == "x"

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error: '.*file"):  # which file is said
        write_atomic(tmp_path / "file", "y")
    assert (tmp_path / "file").read_text() == "x"


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


# --- readers that stand elsewhere, each with the table's case --------------------------------------------------------


def test_a_config_that_is_no_file_is_called_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, kind in ((tmp_path, "is a folder"), (tmp_path / "pipe.yaml", "is a pipe or a device"), ("no.yaml", "")):
        with pytest.raises(SystemExit) as end:
            parse_config(["--config", str(path)])
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and str(path) in said
        assert f"{kind}, not a file of options" in said if kind else "no such file" in said


@pytest.mark.parametrize("flag", ["--seed", "--optim.lr", "--schedule.steps"])
@pytest.mark.parametrize("digits", [400, 4000, 5000])
def test_a_number_of_many_digits_is_one_short_line(flag: str, digits: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config([flag, "9" * digits])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and flag.strip("-") in said and len(said) < 300


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "1e999", "nan", "\x1b[2J"])
def test_a_number_of_a_command_has_limits(text: str) -> None:
    for kind in (int, float):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            number(1, kind=kind)(text)
        assert len(str(error.value)) < 200 and "\x1b" not in str(error.value)


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    strange = ('{"step": 1e999, "prefix": "train"}', "[" * 5000, "3", '{"step": "x"}', "null", '["step"]')
    path.write_text("\n".join([*strange, '{"step": 2, "prefix": "train", "loss": 1.0}', '{"step": 3, "pre']) + "\n")
    assert read_metrics(path) == {"train": [{"step": 2, "prefix": "train", "loss": 1.0}]}
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 2, "prefix": "train", "loss": 1.0}\n'


def test_an_archive_under_an_arrays_name_is_measured_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((40_000, 28, 28), np.uint8))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    assert (tmp_path / "x.npy").stat().st_size < 100_000
    monkeypatch.setattr("fmnist.apps.monitor.batch.MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(ValueError, match="31,360,[0-9]+ bytes, expected at most 1,000,000"):
        next(read_batch(tmp_path / "x.npy", INFO, Counter()))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "batch"), MemoryError(), KeyError("x")])
def test_the_monitor_has_no_verdict_where_anything_went_wrong(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr("fmnist.apps.monitor.batch.monitor", fail)
    (tmp_path / "config.yaml").write_text("")
    command(monitor_main, tmp_path, tmp_path, status=2, lines=None)


def test_metrics_json_goes_first_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(
        name="run", model="cnn", directory=tmp_path, split="test", tta="none", class_names=CLASS_NAMES,
        images=torch.zeros(20, 28, 28, dtype=torch.uint8), labels=torch.arange(20) % 10,
        logits=torch.eye(10).repeat(2, 1),
    )  # fmt: skip
    found = findings(outcome, quick=True)
    write_evaluation(found)
    assert (tmp_path / "metrics.json").exists()
    (tmp_path / "report.html").write_text("of an earlier one")

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmnist.report.write.plot_reliability", full_disk)
    with pytest.raises(OSError, match="No space"):  # of other images: a quick one with the same results would be kept
        write_evaluation(findings(replace(outcome, data_sha256="0" * 64), quick=True))
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "report.html").exists()


def test_escapes_in_a_path_do_not_reach_the_terminal(tmp_path: Path) -> None:
    run = tmp_path / "\x1b[31mred"
    run.mkdir()
    assert "\x1b" not in command(monitor_main, run, tmp_path, status=2)
