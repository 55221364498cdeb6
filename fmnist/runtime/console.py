"""Messages to people: on the terminal, in train.log, and a mistake in one line; and how a program begins and ends."""

import contextlib
import errno
import hashlib
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fmnist.runtime.environment import ENVIRONMENT, check_allocators, refused_by_a_library, remove_effects
from fmnist.runtime.launcher import is_sibling

logger = logging.getLogger("fmnist")
ASK_OTHERS = timedelta(seconds=2)
LINGER_S = 10.0
GONE = (errno.EPIPE, errno.EIO)  # nobody reads: head has seen enough, the terminal is closed
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
        from tqdm import tqdm  # late: a tenth of a second, before a misspelt option is answered

        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """Send messages to stderr; `Processes` silences all processes but the main one."""
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG)  # train.log has more
    logger.propagate = False


class _LogFile(logging.FileHandler):
    """A log that may fail, as on a full disk: one warning, and the program goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Drop the file; the other handlers have the message."""
        self._drop(sys.exc_info()[1])

    def close(self) -> None:
        """Close the file, which is where a network disk tells that it was full."""
        try:
            super().close()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: object) -> None:
        if self in logger.handlers:
            logger.removeHandler(self)
            logger.warning("%s: further messages are not written: %s", self.baseFilename, error)


def log_to_file(path: Path) -> logging.Handler:
    """Append messages to a file, until `stop_logging_to` is called with what is returned."""
    try:
        handler: logging.Handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        logger.warning("%s: messages are not written: %s", path, error.strerror)
        return logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    return handler


def stop_logging_to(handler: logging.Handler) -> None:
    """Close a file of `log_to_file`."""
    logger.removeHandler(handler)
    handler.close()


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn what is no fault of the program into one line on stderr.

    Status 2 for a user's mistake (ValueError), 1 for a non-finite value and for the system's refusals (OSError: disk
    full, read-only, lost files).
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (ValueError, FloatingPointError) as error:  # as a rule the same on all processes
        line = f"{program}: error: {one_line(error, MAX_ERROR)}\n"
        if _is_first_to_say(line):
            sys.stderr.write(line)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    except OSError as error:  # one process' own
        sys.stderr.write(f"{program}: error: {one_line(error, MAX_ERROR)}\n")
        raise SystemExit(1) from None


def _is_first_to_say(line: str) -> bool:
    """Say whether no other process of this run has said the same; true where they cannot be asked."""
    address, port = ENVIRONMENT.get("MASTER_ADDR"), ENVIRONMENT.get("MASTER_PORT", "")
    if ENVIRONMENT.get("WORLD_SIZE", "1") == "1" or not address or not port.isdigit() or "torch" not in sys.modules:
        return True
    from torch.distributed import TCPStore

    mine, digest = f"rank {ENVIRONMENT.get('RANK')}", hashlib.sha256(line.encode()).hexdigest()
    key = f"fmnist error {ENVIRONMENT.get('TORCHELASTIC_RESTART_COUNT', '')} {digest}"
    try:
        store = TCPStore(address, int(port), is_master=False, timeout=ASK_OTHERS, wait_for_workers=False)
        return store.compare_set(key, "", mine).decode() == mine
    except (RuntimeError, ValueError):  # their meeting place is gone, or was another run's
        return True


class _Lasting(io.FileIO):
    """An output that ends no program: what cannot be written is dropped.

    Stdout, which holds results, fails once where someone may still want them: on a full disk.
    """

    silent = False

    def write(self, data: Any, /) -> int:
        try:
            if (written := super().write(data)) is not None:
                return written
        except OSError as error:
            if self.fileno() == 1 and error.errno not in GONE and not self.silent:
                self.silent = True
                raise
        return memoryview(data).nbytes


def open_door(program: str) -> None:
    """Begin a program: outputs that may go away, an end in one line at Ctrl-C, and no variable that changes arithmetic.

    Ctrl-C ends the process at once, whatever it is importing, until there is something to keep: `keep_at_interrupt`.

    Args:
        program: its name in messages.
    """
    remove_effects()
    for descriptor in range(3):  # a closed one (2>&-) would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is None or (old is getattr(sys, f"__{name}__") and not (sys.platform == "win32" and old.isatty())):
            raw = io.BufferedWriter(_Lasting(descriptor, "w", closefd=False))
            line_buffering, encoding = name == "stderr" or raw.isatty(), getattr(old, "encoding", "utf-8")
            new = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=line_buffering)
            setattr(sys, name, new)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            kept = f"; {one_line(error)}" if str(error) else ""
            sys.stderr.write(f"{program}: interrupted{kept}\n")
        elif blamed := refused_by_a_library(error, trace):
            sys.stderr.write(f"{program}: error: {blamed}: {one_line(str(error).strip().partition(chr(10))[0])}\n")
            raise SystemExit(2)
        else:
            sys.__excepthook__(kind, error, trace)

    def end(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{program}: interrupted\n".encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that a shell's loop ends too
        signal.raise_signal(signal.SIGINT)

    sys.excepthook = report
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a job in the background ignores it
        signal.signal(signal.SIGINT, end)
    with same_arguments(), one_line_errors(program):
        check_allocators()


@contextmanager
def same_arguments() -> Iterator[None]:
    """Be silent while a command line is parsed that another process of the same launcher has been given too."""
    if not is_sibling():
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            yield
    except SystemExit as end:
        if end.code:
            time.sleep(LINGER_S)  # the launcher ends all when the first ends: that should be the one that reports
        raise


@contextmanager
def keep_at_interrupt() -> Iterator[list[bool]]:
    """Let the first Ctrl-C end this block alone, so that what it made is kept; the second one ends the program.

    Yields:
        A list that is empty until the block is interrupted.
    """
    interrupted: list[bool] = []
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield interrupted
    except KeyboardInterrupt:
        interrupted.append(True)
    finally:
        signal.signal(signal.SIGINT, before)
