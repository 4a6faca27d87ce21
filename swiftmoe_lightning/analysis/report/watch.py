"""A run's page while the run goes on, served to the browsers of this machine."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any, Final

from typing_extensions import override

from swiftmoe_lightning.analysis.read_trace import read_trace
from swiftmoe_lightning.analysis.report.page import Status, page_html, waiting_html
from swiftmoe_lightning.analysis.report.plan_page import run_page

_LOOPBACK: Final = "127.0.0.1"
# Any port, since an SSH tunnel may have another one at its near end.
_OWN_HOST: Final = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
# The recorder writes twice a minute, and less often only if a write takes long.
_QUIET_S: Final = 300
_RECORDINGS: Final = (".npz", ".parquet")


class LivePage:
    """The page of a run's recording as it is now. It is made when it is asked for, and the recording has changed.

    Args:
        run: a run folder of `swiftmoe train`, or the file that `PlacementRecorder` writes. It need not be there yet.
    """

    def __init__(self, run: Path) -> None:
        is_file = run.is_file() or run.suffix.lower() in _RECORDINGS
        self.recording = run if is_file else run / "placements.npz"
        self._title = run.resolve().name
        self._lock, self._made = Lock(), ("", b"")

    def current(self) -> tuple[str, bytes]:
        """A tag (HTTP's ETag) that changes with the page, and the page. May be called by several threads."""
        with self._lock:
            written: float | None = None
            tag = '"waiting"'
            with suppress(FileNotFoundError, NotADirectoryError):
                file = self.recording.stat()
                written, is_quiet = file.st_mtime, time.time() - file.st_mtime > _QUIET_S
                tag = f'"{file.st_mtime_ns:x}-{file.st_size:x}-{is_quiet:d}"'
            if self._made[0] != tag:
                self._made = tag, self._make(written)
            return self._made

    def _make(self, written: float | None) -> bytes:
        if written is None:
            return waiting_html(
                self._title, Status("Waiting for the first step.", f"There is no {self.recording} yet.")
            )
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
        try:
            trace = read_trace(self.recording)
            page = run_page(trace, self._title)
        except (ValueError, OSError, ImportError) as error:
            return waiting_html(self._title, Status("The recording cannot be read.", f"{when}: {error}"))
        since = f"Step {trace.step_U[-1]}, written {when}."
        # A recording of an older version was written when its run was over.
        if trace.metadata.get("finished", True):
            return page_html(page, Status("The run has ended.", since))
        if time.time() - written > _QUIET_S:
            return page_html(page, Status("Nothing new for 5 minutes: the run may have stopped.", since))
        return page_html(page, Status("The run goes on.", since))


class PageServer(ThreadingHTTPServer):
    """Serves a page at http://127.0.0.1:PORT/, to this machine alone, until it is interrupted.

    Args:
        page: what it serves.
        port: 0 takes a free one; see `url`.

    Raises:
        OSError: for a port that cannot be opened.
    """

    def __init__(self, page: LivePage, port: int = 0) -> None:
        self.page = page
        try:
            super().__init__((_LOOPBACK, port), _Handler)
        except OSError as error:
            raise OSError(
                f"port {port} of {_LOOPBACK} cannot be opened ({error.strerror}). Name another one."
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{_LOOPBACK}:{self.server_port}/"

    def serve_until_interrupted(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self.server_close()

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that goes away while it is answered is no error.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        # A page of another site can have its name resolved to this machine, but the browser still sends that name.
        if not _OWN_HOST.fullmatch(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, explain=f"Open {self.server.url} itself.")
            return
        if self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        tag, page = self.server.page.current()
        is_known = self.headers.get("If-None-Match") == tag
        self.send_response(HTTPStatus.NOT_MODIFIED if is_known else HTTPStatus.OK)
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Content-Type", "text/html; charset=utf-8")
        if not is_known:
            self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if not is_known:
            self.wfile.write(page)

    @override
    def log_message(self, *_: Any) -> None:
        """Say nothing: the page asks every two seconds."""
