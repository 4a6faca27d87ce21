"""A run, or policies compared on a trace, as one HTML file that needs nothing but a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from swiftmoe_lightning.analysis.report import page_numbers, page_text
from swiftmoe_lightning.analysis.report.page_data import PageData, PolicySeries

__all__ = ["PageData", "PolicySeries", "Status", "page_html", "waiting_html", "write_page"]

_SCRIPTS: Final = ("page_charts.js", "page_heat.js", "page_bars.js", "page.js")


@dataclass(frozen=True)
class Status:
    """How a run is that is watched.

    Attributes:
        state: in a few words.
        since: what that is known from.
    """

    state: str
    since: str


def write_page(path: str | Path, page: PageData) -> None:
    """Write `page` to the file `path`: tables, and charts drawn by the page's own script.

    The file loads nothing, so it can be mailed and opened offline. Equal data give equal bytes. Long runs are averaged
    into at most 400 columns, which keeps 2,000 steps of 24 layers with 64 experts below 5 MB.

    Args:
        path: the file.
        page: what to show.
    """
    # The page is whole before the file is opened, so that a failure leaves no cut file.
    Path(path).write_bytes(page_html(page))


def page_html(page: PageData, status: Status | None = None) -> bytes:
    """The page as a file's content.

    Args:
        page: what to show.
        status: of a run that goes on; the page then asks the server that it came from what is new.
    """
    parts = {
        "title": escape(page.title),
        "subtitle": escape(page.subtitle),
        "summary": escape(page_text.summary(page)),
        "policies": page_text.policy_table(page),
        "notes": page_text.notes(page),
        "losses": page_text.loss_table(page),
        "style": _asset("page.css"),
        "data": _safe_json(_chart_data(page)),
        **_live_parts(_SCRIPTS, status),
    }
    return _filled("page.html", parts)


def waiting_html(title: str, status: Status) -> bytes:
    """The page of a run that nothing can be drawn of yet, which asks the server that it came from what is new.

    Args:
        title: the page's.
        status: why.
    """
    parts = {"title": escape(title), "style": _asset("page.css"), **_live_parts((), status)}
    return _filled("page_waiting.html", parts)


def _live_parts(scripts: tuple[str, ...], status: Status | None) -> dict[str, str]:
    """What tells a live page from one that is done: its status, and leave to ask for more."""
    shown = ""
    if status is not None:
        scripts = (*scripts, "page_live.js")
        state, since = escape(status.state), escape(status.since)
        shown = f'<p class="quiet"><b id="state" role="status">{state}</b> <span id="since">{since}</span></p>'
    return {
        "status": shown,
        "sources": "" if status is None else "; connect-src 'self'",
        "script": "\n".join(_asset(name) for name in scripts),
    }


def _filled(template: str, parts: Mapping[str, str]) -> bytes:
    # In one pass, so that data that look like a placeholder of the template are not replaced.
    html = re.sub(
        r"\{\{(\w+)\}\}", lambda placeholder: parts[placeholder[1]], _asset("page_head.html") + _asset(template)
    )
    # The title may be a file's name, which need not be Unicode.
    return html.encode("utf-8", errors="replace")


def _asset(name: str) -> str:
    return files("swiftmoe_lightning.analysis.report").joinpath(name).read_text(encoding="utf-8")


def _chart_data(page: PageData) -> dict[str, Any]:
    terms = page_text.loss_terms(page)
    return {
        "experts": page.counts_ULE.shape[2],
        "layers": page.layers,
        "dropless": page.capacity_factor is None,
        "lossTerms": terms,
        "policies": [_policy_data(policy, terms) for policy in page.policies],
        "lines": page_numbers.lines(page),
        "maps": page_numbers.maps(page),
    }


def _policy_data(policy: PolicySeries, terms: list[str]) -> dict[str, Any]:
    return {
        "name": policy.name,
        "sent": [None if value is None else float(value) for value in policy.sent],
        "losses": [float(policy.losses.get(term, 0.0)) for term in terms] if policy.losses else None,
    }


def _safe_json(value: Any) -> str:
    """JSON in which no name can end the script element or open a comment."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
