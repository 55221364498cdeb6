"""Messages to people: an error is one line, whatever it holds."""

import pytest

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
