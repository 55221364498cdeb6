"""A mirror of the data on this machine, for the tests: what it answers is the test's to say."""

import http.server
import threading
from collections.abc import Callable

Handler = http.server.BaseHTTPRequestHandler


class Mirror(http.server.ThreadingHTTPServer):
    """A mirror on this machine; `answer` says what a file's name gets, `requests` is what was asked for."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, Handler], None]) -> None:
        self.requests: list[str] = []
        mirror = self

        class Answer(Handler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path.strip("/"))
                answer(self.path.strip("/").removesuffix(".gz"), self)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *args: object) -> None:
        """A client that was killed or gave up is what these tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


def send(handler: Handler, body: bytes, length: int | None = None) -> None:
    """Answer with a body, and a length that need not be its own."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)
