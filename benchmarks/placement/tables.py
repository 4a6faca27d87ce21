"""The placement benchmark's results as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

# Okabe and Ito's colours, and a marker each, so that policies can be told apart without colours.
_LOOKS: Final = {
    "balanced": ("#0072b2", "o"),
    "packed": ("#56b4e9", "s"),
    "symi": ("#d55e00", "^"),
    "static": ("#000000", "X"),
    "flexmoe-10": ("#009e73", "D"),
    "swap": ("#f0e442", "h"),
    "eplb": ("#cc79a7", "v"),
    "shadowing": ("#e69f00", "P"),
    "oracle": ("#999999", "*"),
}


def write_tables(results: dict[str, Any], path: Path) -> Path:
    """One Markdown table for each trace and capacity: policies down, slots across."""
    lines = [
        f"# Placement policies on traces, {results['ranks']} ranks",
        "",
        "Plans are one step old. Each cell: dropped assignments / imbalance (busiest rank's load over the mean) "
        "/ bytes of both weight phases, over what the paper's way sends with symi's placements. Without a capacity "
        "nothing is dropped. `static`, `symi` and FlexMoE have slot budgets, the others budgets pooled "
        "over a rank. `static-pooled` is `static` with those and our split. "
        "FlexMoE, EPLB, LPT and shadowing are re-implementations; `oracle` and `shadowing` know the "
        "step that they serve.",
    ]
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["trace"], row["capacity_factor"]), []).append(row)
    for (trace, factor), rows in groups.items():
        capacity = "dropless" if factor is None else f"capacity factor {factor:g}"
        lines += ["", f"## {trace}, {capacity}", ""]
        lines.append("| policy | " + " | ".join(f"s = {row['slots_per_rank']}" for row in rows) + " |")
        lines.append("|---" * (len(rows) + 1) + "|")
        for name in rows[0]["policies"]:
            lines.append(f"| {name} | " + " | ".join(_cell(row, name) for row in rows) + " |")
        percent = [_percent(row["bounds"]["dropped"]) if factor else "" for row in rows]
        bounds = [f"{text}{row['bounds']['imbalance']:.2f}" for text, row in zip(percent, rows, strict=True)]
        lines.append("| *best possible* | " + " | ".join(bounds) + " |")
    path.write_text("\n".join(lines) + "\n")
    return path


def _percent(share: float) -> str:
    return f"{100 * share:.1f} % / "


def _cell(row: dict[str, Any], name: str) -> str:
    numbers = row["policies"][name]
    dropped = "" if row["capacity_factor"] is None else _percent(numbers["dropped"])
    state = numbers["bytes_state_moved"]
    moved = f" + {state / _paper(row):.2f} state" if state else ""
    return f"{dropped}{numbers['imbalance']:.2f} / {_sent(row, name):.2f}{moved}"


def _paper(row: dict[str, Any]) -> float:
    return float(row["policies"]["symi"]["bytes_paper"])


def _sent(row: dict[str, Any], name: str) -> float:
    numbers = row["policies"][name]
    return float(numbers["bytes_gradients"] + numbers["bytes_weights"]) / _paper(row)


def draw_frontier(results: dict[str, Any], path: Path) -> Path:
    """Bytes against drops (capacity factor 1) and against imbalance (dropless): a column for each trace."""
    traces = list(dict.fromkeys(row["trace"] for row in results["rows"]))
    figure = Figure(figsize=(3.6 * len(traces), 7), layout="constrained")
    axes = figure.subplots(2, len(traces), sharex=True, sharey="row", squeeze=False)
    for column, trace in enumerate(traces):
        for axis, factor, key in ((axes[0, column], 1.0, "dropped"), (axes[1, column], None, "imbalance")):
            rows = [r for r in results["rows"] if r["trace"] == trace and r["capacity_factor"] == factor]
            _draw_policies(axis, rows, key)
        axes[0, column].set_title(trace, fontsize=10)
        axes[1, column].set_xlabel("bytes of both phases / paper's way at symi")
    axes[0, 0].set_ylabel("dropped assignments, capacity factor 1")
    axes[1, 0].set_ylabel("imbalance, dropless")
    axes[0, 0].set_yscale("symlog", linthresh=0.01)
    axes[0, 0].set_ylim(0, 1)
    axes[0, 0].set_yticks([0, 0.01, 0.03, 0.1, 0.3, 1], ["0", "1 %", "3 %", "10 %", "30 %", "100 %"])
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_yticks([1, 1.1, 1.3, 2, 4, 8], ["1", "1.1", "1.3", "2", "4", "8"], minor=False)
    axes[1, 0].minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _draw_policies(axis: Any, rows: list[dict[str, Any]], key: str) -> None:
    for name, (colour, marker) in _LOOKS.items():
        points = sorted((_sent(row, name), row["policies"][name][key], row["slots_per_rank"]) for row in rows)
        x, y, slots = zip(*points, strict=True)
        axis.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=0.8, label=name)
        if name in ("balanced", "symi"):
            for point in zip(x, y, slots, strict=True):
                axis.annotate(f"s={point[2]}", point[:2], xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.grid(alpha=0.25)
