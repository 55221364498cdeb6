"""Messages to people: on the terminal, in train.log, and a mistake in one line."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger("fmnist")
MAX_ERROR = 2000  # characters of the line that ends a command: it may name several files and the ways out


def one_line(text: str | BaseException, limit: int = 300) -> str:
    """Put a text or an error's message on one line; control characters become spaces.

    Args:
        text: an error without a message gives its type.
        limit: characters at most.
    """
    said = str(text) or (type(text).__name__ if isinstance(text, BaseException) else "")
    return " ".join("".join(c if c.isprintable() else " " for c in said).split())[:limit]


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 process, 2 processes.

    Args:
        number: of things.
        noun: for one of them.
        plural: for several; the noun with an s where it is left out.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class _AboveTheBar(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a message so that a progress bar on the same terminal stays whole."""
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """Send messages to stderr: from the main process all, from the others warnings; metrics where no bar is drawn."""
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.propagate = False
    metrics = logging.getLogger("fmnist.metrics")
    metrics.propagate = not sys.stderr.isatty()


def log_to_file(path: Path) -> None:
    """Append messages and metrics to train.log."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    metrics = logging.getLogger("fmnist.metrics")
    if not metrics.propagate:
        metrics.addHandler(handler)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn what is no fault of the program into one line on stderr.

    Status 2 for a user's mistake (ValueError), 1 for a non-finite value and for the system's refusals (OSError: disk
    full, read-only, lost files).
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:  # the same on all processes: one of them says it
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"{program}: error: {one_line(error, MAX_ERROR)}\n")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    except OSError as error:  # one process' own
        sys.stderr.write(f"{program}: error: {one_line(error, MAX_ERROR)}\n")
        raise SystemExit(1) from None
