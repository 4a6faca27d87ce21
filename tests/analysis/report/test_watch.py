"""A run's page while the run goes on: as HTTP tells it, and in a browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from typer.testing import CliRunner

from swiftmoe_lightning.analysis.read_trace import read_trace
from swiftmoe_lightning.analysis.report.watch import LivePage, PageServer
from swiftmoe_lightning.analysis.write_trace import write_npz, write_parquet
from swiftmoe_lightning.cli import app
from tests.browser import browser, needs_browser
from tests.helpers import free_port

L, E, W = 2, 6, 2


def write(path: Path, steps: int, finished: bool = False, layers: int = L) -> None:
    """A recording of so many steps, as PlacementRecorder writes it; path: of the file."""
    random = np.random.default_rng(0)
    counts = random.integers(1, 50, (steps, W, layers, E))
    arrays = {
        "counts": counts,
        "replicas": random.integers(1, 4, (steps, layers, E)),
        "loads": random.integers(9, 99, (steps, layers, W)),
        "dropped": random.integers(0, 9, (steps, layers)),
        "moved": random.integers(0, 9, (steps, layers)),
        "step": np.arange(1, steps + 1),
    }
    names = [f"blocks.{layer}.experts" for layer in range(layers)]
    metadata = {"layers": names, "world_size": W, "slots_per_rank": 4, "capacity_factor": 1.0, "finished": finished}
    write_npz(path, arrays, metadata)


@contextmanager
def serving(run: Path) -> Iterator[PageServer]:
    server = PageServer(LivePage(run))
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(server: PageServer, tag: str = "", path: str = "/", method: str = "GET", **headers: str) -> Any:
    """Status, tag and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={"If-None-Match": tag, **headers})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, answer.getheader("ETag"), content


def state(html: str) -> str:
    found = re.search(r'<b id="state" role="status">(.*?)</b> <span id="since">(.*?)</span>', html)
    assert found is not None
    return f"{found[1]} {found[2]}"


def steps(html: str) -> list[int]:
    script = re.search(r'id="data">(.*?)</script>', html)
    assert script is not None
    return json.loads(script[1])["lines"]["last"]


def test_a_page_waits_for_the_run_goes_with_it_and_says_when_it_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recording = run / "placements.npz"
    with serving(run) as server:
        status, tag, html = get(server)
        assert (status, state(html)) == (200, f"Waiting for the first step. There is no {recording} yet.")
        assert get(server, tag) == (304, tag, "")

        write(recording, 1)
        status, first, html = get(server, tag)
        assert (status, steps(html)) == (200, [1])
        assert re.fullmatch(r"The run goes on\. Step 1, written \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.", state(html))
        assert "this run drops" in html
        assert "2 ranks of 4 slots" in html
        # A recording does not say what was sent.
        assert "bytes a step" not in html
        assert "Paper's way" not in html
        assert get(server, first) == (304, first, "")

        write(recording, 3, finished=True)
        status, ended, html = get(server, first)
        assert (status, steps(html)) == (200, [1, 2, 3])
        assert state(html).startswith("The run has ended. Step 3, written ")

        write(recording, 4)
        os.utime(recording, (0, 0))
        _, _, html = get(server, ended)
        assert state(html).startswith("Nothing new for 5 minutes: the run may have stopped. Step 4, written ")

        recording.write_bytes(recording.read_bytes()[:100])
        _, _, html = get(server, ended)
        assert re.match(r"The recording cannot be read\. 20.*placements\.npz: the archive is cut off", state(html))
        write(recording, 5, finished=True)
        assert steps(get(server, ended)[2]) == [1, 2, 3, 4, 5]


def test_only_this_machine_is_answered_and_only_for_the_page(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        for host in ("127.0.0.1", "localhost:9000"):
            assert get(server, Host=host)[0] == 200
        for host in ("example.org", f"example.org:{server.server_port}", "127.0.0.1.example.org", ""):
            status, _, html = get(server, Host=host)
            assert status == 403
            assert f"Open {server.url} itself." in html
        assert get(server, path="/placements.npz")[0] == get(server, path="/../")[0] == 404
        assert get(server, method="POST")[0] == 501


def test_a_recording_of_counts_alone_shows_popularity(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    write_parquet(path, {"counts": np.ones((2, W, L, E), dtype=int), "step": np.arange(2)}, {})
    _, page = LivePage(path).current()
    assert "Popularity over 2 steps, 2 layers, 6 experts." in page.decode()


def test_a_recording_is_read_whole_while_it_is_written_and_a_link_stays_one(tmp_path: Path) -> None:
    file, link = tmp_path / "disk" / "trace.npz", tmp_path / "trace.npz"
    write(file, 1)
    link.symlink_to(file)
    is_done = False

    def write_on() -> None:
        for num_steps in range(2, 60):
            write(link, num_steps)
        nonlocal is_done
        is_done = True

    writer = Thread(target=write_on)
    writer.start()
    seen = []
    while not is_done:
        seen.append(read_trace(link).num_steps)
    writer.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 1
    assert link.is_symlink()
    assert sorted(path.name for path in file.parent.iterdir()) == ["trace.npz"]


def test_a_port_that_is_taken_ends_with_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["watch", str(tmp_path), "--port", str(port)])
    assert result.exit_code == 2
    assert result.stderr == (
        f"swiftmoe watch: port {port} of 127.0.0.1 cannot be opened (Address already in use). Name another one.\n"
    )


def test_an_interrupt_ends_the_command_quietly(tmp_path: Path) -> None:
    port = free_port()

    def interrupt() -> None:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                    assert connection.recv(100).startswith(b"HTTP/1.0 200")
                break
            except ConnectionRefusedError:
                continue
        os.kill(os.getpid(), signal.SIGINT)

    browser_of_user = Thread(target=interrupt)
    browser_of_user.start()
    result = CliRunner().invoke(app, ["watch", str(tmp_path), "--port", str(port)])
    browser_of_user.join()
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"Open http://127.0.0.1:{port}/ in a browser. Ctrl-C ends this.\n"


@needs_browser
def test_in_a_browser_new_steps_come_without_losing_place_choice_or_focus(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with serving(run) as server, browser(tmp_path / "profile", width=390, height=700) as tab:
        tab.open(server.url)
        assert "Waiting for the first step." in tab.run("document.body.innerText")
        write(run / "placements.npz", 5)
        tab.wait_for("document.querySelector('#popularity canvas')")
        tab.run(
            """
            const layer = document.getElementById("map-layer");
            layer.value = "1";
            layer.dispatchEvent(new Event("change"));
            const chart = document.querySelector("#expert svg");
            chart.scrollIntoView();
            chart.focus({ preventScroll: true });
            chart.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
            window.isTheSameDocument = true;
            """
        )
        kept = """
            [scrollY, document.getElementById("map-layer").value, document.activeElement.closest("figure").id,
             document.querySelector("#expert .readout").textContent, window.isTheSameDocument]
        """
        before = tab.run(kept)
        assert before[0] > 100
        assert before[1:3] == ["1", "expert"]
        assert before[3].startswith("step 1: popularity")
        write(run / "placements.npz", 9, finished=True)
        tab.wait_for("document.getElementById('state').textContent === 'The run has ended.'")
        assert tab.run("document.querySelector('#popularity canvas').width") == 9
        after = tab.run(kept)
        assert after == before

        # Other layers need other controls, so that page is made anew.
        write(run / "placements.npz", 9, layers=3)
        tab.wait_for("document.getElementById('map-layer').options.length === 3")
        tab.wait_for("document.querySelector('#losses').closest('section').hidden")
        server.shutdown()
        server.server_close()
        tab.wait_for("document.getElementById('state').textContent.startsWith('No answer')")
