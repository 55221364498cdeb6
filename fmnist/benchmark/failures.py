"""What a loader of another library may do at any moment: raise, or lose a worker process."""

from collections.abc import Callable

from fmnist.runtime.console import one_line


class LoaderFailed(Exception):
    """A loader that cannot be timed, on this process or another; the message says why, in one line."""


def failure_of(action: Callable[[], object], fatal: tuple[type[Exception], ...] = ()) -> str:
    """Call what is a loader's own, which may raise anything; return why it failed, in one line, or an empty string.

    Args:
        action: to call.
        fatal: errors that are passed on.
    """
    try:
        action()
    except fatal:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # "exited unexpectedly" comes of "is killed by signal"
        source = cause if str(cause) else error
        lines = str(source).strip().splitlines() or [""]
        if any(line.startswith("Original Traceback") for line in lines):  # of a worker, its own error at the end
            return one_line(lines[-1])
        return one_line(f"{type(source).__name__}: {lines[0]}".removesuffix(": "))
    return ""
