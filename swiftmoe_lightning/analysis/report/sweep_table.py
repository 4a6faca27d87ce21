"""A sweep and what it recommends: tables and sentences for the terminal, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from textwrap import fill
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from swiftmoe_lightning.analysis.recommend import LEAST_GAIN, Recommendation
from swiftmoe_lightning.analysis.report.page_text import bytes_text, many, seconds_text
from swiftmoe_lightning.analysis.report.plan_table import print_table
from swiftmoe_lightning.analysis.sweep import Point, Sweep

_WIDTH: Final = 100


def print_recommendation(sweep: Sweep, points: Sequence[Point], best: Recommendation) -> None:
    """What to take and why, what each further slot would buy, and the other group sizes, on standard output."""
    for sentence in best.sentences(points):
        print(fill(sentence, _WIDTH))
    print_table(slots_table(points, best))
    print_table(groups_table(best))
    for sentence in (basis(sweep, points), *unknowns(sweep)):
        print(fill(sentence, _WIDTH))


def slots_table(points: Sequence[Point], best: Recommendation) -> Table:
    """The numbers of slots in groups of the recommended size, and what the next one of them would change."""
    chosen = best.point
    factor = best.capacity_factor or min(chosen.dropped)
    table = _table(
        f"Slots of a rank in groups of {chosen.group_size}, and what the next number of them would change",
        *("slots", "imbalance", f"dropped at {factor:g}", "sent", "memory"),
        *("next: imbalance", "next: dropped", "next: sent", "next: memory"),
    )
    same_group = [point for point in points if point.group_size == chosen.group_size]
    for point, following in zip_longest(same_group, same_group[1:]):
        cells = [
            f"{'* ' if point is chosen else ''}{point.slots_per_rank}",
            f"{point.imbalance:.3f}",
            f"{point.dropped[factor]:.2%}",
            bytes_text(point.sent_bytes),
            bytes_text(point.slot_bytes),
        ]
        if following is not None:
            cells += [
                f"{following.imbalance - point.imbalance:+.3f}",
                f"{following.dropped[factor] - point.dropped[factor]:+.2%}",
                _signed(following.sent_bytes - point.sent_bytes),
                _signed(following.slot_bytes - point.slot_bytes),
            ]
        table.add_row(*cells)
    return table


def groups_table(best: Recommendation) -> Table:
    """Each group size at its own number of slots, with what every capacity factor would drop."""
    factors = list(best.point.dropped)
    table = _table(
        "Each group size with its own number of slots; dropped at each capacity factor",
        *(
            "group",
            "slots",
            "imbalance",
            *(f"{factor:g}" for factor in factors),
            "in group",
            "across",
            "memory",
            "time",
        ),
    )
    for point in best.knees:
        table.add_row(
            f"{'* ' if point is best.point else ''}{point.group_size}",
            str(point.slots_per_rank),
            f"{point.imbalance:.3f}",
            *(f"{point.dropped[factor]:.2%}" for factor in factors),
            bytes_text(point.group_bytes),
            bytes_text(point.across_bytes),
            bytes_text(point.resident_bytes),
            seconds_text(point.seconds),
        )
    return table


def title(sweep: Sweep) -> str:
    """A phrase for the trace and the ranks."""
    trace = sweep.trace
    return (
        f"{many(trace.num_steps, 'step')}, {many(trace.num_layers, 'layer')}, {many(trace.num_experts, 'expert')} on "
        f"{many(sweep.cluster.num_ranks, 'rank')}"
    )


def basis(sweep: Sweep, points: Sequence[Point]) -> str:
    """What was replayed, and what the numbers mean."""
    trace, rows = sweep.trace, sum(len(rows) for rows in sweep.stretches)
    machine, cluster = sweep.machine, sweep.cluster
    said = f"*: recommended. Replayed {rows:,} of {many(trace.num_steps, 'step')}"
    if len(sweep.stretches) > 1:
        said += f", in {len(sweep.stretches)} stretches"
    said += f", and {len(sweep.layers)} of {many(trace.num_layers, 'layer')}, on {many(cluster.num_ranks, 'rank')}"
    if any(cluster.num_ranks // point.group_size > 2 for point in points):
        said += "; of more than two groups the first and the last"
    return (
        f"{said}. imbalance: busiest rank / mean rank; the next slots must lower it by {LEAST_GAIN:g} to be worth it. "
        "sent: bytes of a rank and step in both weight phases; memory: of a rank for the weights in its slots (in the "
        f"second table with its part of the state), for experts of {bytes_text(machine.expert_bytes)}. time: on paper, "
        f"of weights and tokens{'' if machine.flops is None else ' and experts'}, phase after phase, links of "
        f"{bytes_text(cluster.node_bytes)}/s among {many(cluster.ranks_per_node, 'rank')} of a node, else "
        f"{bytes_text(cluster.network_bytes)}/s."
    )


def unknowns(sweep: Sweep) -> list[str]:
    """What the trace and the options do not tell, and how to learn it."""
    said = []
    if sweep.unknown_sizes:
        sizes = ", ".join(map(str, sweep.unknown_sizes))
        said.append(
            f"Not known: groups of {sizes}, since the trace does not tell the tokens of {sweep.cluster.num_ranks} "
            "ranks apart. PlacementRecorder does; `swiftmoe scale` compares groups without a trace."
        )
    if not sweep.machine.assignment_bytes:
        said.append("Not known: the time of tokens on the wire, which small groups shorten. Give --token-bytes.")
    if sweep.machine.flops is None:
        said.append("Not known: the time of the experts. Give --tflops and --link-gbps.")
    return said


def as_json(sweep: Sweep, points: Sequence[Point], best: Recommendation) -> dict[str, Any]:
    """All numbers; bytes and seconds as in `Point`."""
    return {
        "settings": best.settings,
        "why": best.sentences(points)[1:],
        "points": [asdict(point) | {"fits": point.resident_bytes <= sweep.most_bytes} for point in points],
        "knees": {str(point.group_size): point.slots_per_rank for point in best.knees},
        "most_dropped": best.most_dropped,
        "ranks": sweep.cluster.num_ranks,
        "steps": [[rows.start, rows.stop] for rows in sweep.stretches],
        "layers": [sweep.trace.layers[layer] for layer in sweep.layers],
        "unknown": unknowns(sweep),
    }


def _signed(difference: float) -> str:
    return f"{'-' if difference < 0 else '+'}{bytes_text(abs(difference))}"


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
