"""Messages to people: an error is one line, whatever it holds."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, environment

from fmnist.apps.views import count_kinds
from fmnist.runtime.console import one_line, one_line_errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\n  lines", "two lines"),
        ("\x1b[31mred\x07\r\x00", "[31mred"),  # an escape must not reach the terminal
        ("line\u2028separator \udcff", "line separator"),  # a surrogate stands for a byte that is no UTF-8
        ("Schuhgröße 42", "Schuhgröße 42"),
        (ValueError("a\nb"), "a b"),
        (TimeoutError(), "TimeoutError"),
        ("", ""),
    ],
)
def test_one_line(text: str | Exception, expected: str) -> None:
    assert one_line(text) == expected


def test_a_log_takes_every_name_in_every_locale(tmp_path: Path) -> None:
    code = (
        "import logging, pathlib, sys\nfrom fmnist.runtime.console import log_to_file\n"
        "logging.getLogger('fmnist').setLevel('INFO')\nlog_to_file(pathlib.Path(sys.argv[1]))\n"
        "logging.getLogger('fmnist').info('Schuhgr\\xf6\\xdfe \\udcff')\nlogging.getLogger('fmnist').info('the end')"
    )
    ascii_only = environment() | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "log"], cwd=ROOT, env=ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert first.endswith("Schuhgröße \\udcff") and second.endswith("the end")


def test_kinds_of_files_reach_no_terminal_raw() -> None:
    assert count_kinds(Counter({".\x1b]0;x\x07": 2, ".txt": 1})) == "2 . ]0;x, 1 .txt"


def test_one_line_has_a_limit() -> None:
    assert one_line("x" * 1000) == "x" * 300
    assert one_line("a\n" * 1000, 5) == "a a a"


def test_a_command_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error, status in (
        (ValueError("bad\n\x1b[0mname"), 2),
        (OSError("disk\nfull"), 1),
        (FloatingPointError("x"), 1),
    ):
        with pytest.raises(SystemExit) as end, one_line_errors("command"):
            raise error
        assert end.value.code == status
        assert capsys.readouterr().err == f"command: error: {one_line(error)}\n"
