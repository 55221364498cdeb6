"""Open a URL within a time limit, and ask whether a server answers at all."""

import queue
import threading
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

# What an unreachable, silent or broken server raises: refused, no such name, a timeout, no HTTP.
URL_ERRORS = (OSError, HTTPException, ValueError)


def open_url(url: str, timeout_s: float) -> Any:
    """Open a URL and return the response once its headers have arrived.

    Args:
        url: http, https or file.
        timeout_s: limit of the whole wait for the headers, and of each later read; seconds.

    Returns:
        The response of urllib; the caller closes it.

    Raises:
        OSError, HTTPException, ValueError: see URL_ERRORS; TimeoutError after `timeout_s`.
    """
    replies: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            replies.put(urllib.request.urlopen(url, timeout=timeout_s))
        except Exception as error:
            replies.put(error)

    # In a thread: a name look-up, and headers that trickle in, obey no socket timeout.
    threading.Thread(target=ask, daemon=True).start()
    try:
        reply = replies.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None
    if isinstance(reply, Exception):
        raise reply
    return reply


def answers(url: str, timeout_s: float) -> bool:
    """Return whether a server answers within `timeout_s` seconds, with any HTTP status."""
    try:
        open_url(url, timeout_s).close()
    except URL_ERRORS as error:
        return isinstance(error, HTTPError)
    return True
