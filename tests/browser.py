"""A headless Chromium that pages are tried in, driven over its DevTools pipe. Tests without one are skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Browser:
    """One tab. send, receive: ends of the pipes to the browser."""

    def __init__(self, send: Any, receive: Any) -> None:
        self._send, self._receive = send, receive
        self._session: str | None = None
        self._last = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> Any:
        """The result of a DevTools command."""
        self._last += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": self._last, "method": method, "params": params, **session}
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while (answer := self._next()).get("id") != self._last:
            # An event, which nobody waits for.
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> Any:
        message = b""
        while (byte := self._receive.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self._evaluate(script)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is drawn."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    def wait_for(self, condition: str, timeout_s: float = 20) -> None:
        """Wait until an expression in the page is true. One that raises is not true yet: while a page is made anew, its
        elements are missing."""
        end = time.monotonic() + timeout_s
        while not (answer := self._evaluate(f"Boolean({condition})"))["result"].get("value"):
            assert time.monotonic() < end, f"{condition}: {answer}"
            time.sleep(0.05)


@contextmanager
def browser(profile: Path, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """A browser with a window of that size. profile: an empty folder."""
    assert CHROMIUM is not None
    to_read, to_send = os.pipe()
    from_read, from_send = os.pipe()
    command = [
        *("bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_send}', "bash", CHROMIUM, "--headless=new", "--no-sandbox"),
        *("--remote-debugging-pipe", "--disable-gpu", f"--window-size={width},{height}", f"--user-data-dir={profile}"),
    ]
    process = subprocess.Popen(command, pass_fds=(to_read, from_send), stderr=subprocess.DEVNULL)
    os.close(to_read)
    os.close(from_send)
    with os.fdopen(to_send, "wb") as send, os.fdopen(from_read, "rb") as receive:
        try:
            yield Browser(send, receive)
        finally:
            process.terminate()
            process.wait(20)
