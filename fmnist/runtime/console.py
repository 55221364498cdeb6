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


class _AboveTheBar(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a message so that a progress bar on the same terminal stays whole."""
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """Send messages to stderr: from the main process all, from the others warnings."""
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.propagate = False


def log_to_file(path: Path) -> None:
    """Append messages to train.log, from now on; a second call for the same file does nothing."""
    path = path.absolute()
    if any(isinstance(known, logging.FileHandler) and known.baseFilename == str(path) for known in logger.handlers):
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


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
