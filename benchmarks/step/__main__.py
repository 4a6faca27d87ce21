"""The training step on gloo ranks of this machine's CPU: ours beside other systems', and what it is made of.

All train one small transformer with MoE blocks: the same weights, batches, routes (drawn, --routing) and fused AdamW,
in blocks of steps that alternate in the same processes. A system that drops nothing must have our losses to 1e-4. With
--mbit each node's ranks talk over a link of that speed (Linux, root, iproute2).

over_deepspeed, over_hf_ep,   our step time over that of DeepSpeed's MoE layer without drops, of transformers' expert
over_fsdp2, over_ddp          parallelism, of FSDP2, of DDP with whole experts; null where a package is not installed
adapt_over_frozen             a step with a new placement every step, over the same with one that is kept: equal bytes
control_fraction              share of a step for placing, planning, and counting beyond the exchange of split sizes
weight_phases_fraction        share of a step that waits for, packs or sums experts' weights and gradients
time_over_paper               both weight phases alone, ours over the paper's way at its placement
bytes_over_paper              the same in bytes, here; bytes_over_paper_16_ranks on 16 ranks by the plan, on traces

Writes benchmarks/results/NAME.json, and two steps of rank 0 for chrome://tracing; prints tables. With --json the last
line is one JSON object: the median, least and most of each figure and of how many runs.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.command_line import add_settings, command_line, settings_of
from benchmarks.common.links import Links, missing_for_links, shaped
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.step.effort import Effort, Plan
from benchmarks.step.exchanges import bytes_over_paper, synthetic_traces
from benchmarks.step.measure import TIMEOUT_S, measure
from benchmarks.step.report import figures, print_tables
from benchmarks.step.systems import FROZEN, OF_NODES, OURS, SYSTEMS
from benchmarks.step.workload import LARGE, ROUTINGS, SEQUENCE, Sizes, Workload
from swiftmoe_lightning.analysis import read_trace
from tests.helpers import run_ranks

# The paper's cluster, and traces of popularity where none were recorded.
_PAPERS_RANKS, _PAPERS_SLOTS = 16, 4
_NUM_TRACES = 5


def _parser() -> ArgumentParser:
    parser = command_line("step", __doc__)
    add_settings(parser, Effort, Sizes)
    large = ", ".join(f"{name} {value}" for name, value in asdict(LARGE).items())
    parser.add_argument("--large", action="store_true", help=f"other defaults of the sizes: {large}")
    parser.add_argument("--routing", choices=ROUTINGS, default="zipf", help="how popular experts are")
    others = [name for name in SYSTEMS if name not in (OURS, FROZEN, *OF_NODES)]
    parser.add_argument("--systems", default=",".join(others), help="that ours is compared with; commas between them")
    parser.add_argument("--mbit", type=int, help="megabits a second of each node's link, each way")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="with --mbit: ranks that share a link")
    parser.add_argument("--popularity", type=Path, nargs="*", default=[], help="recorded traces instead of drawn ones")
    parser.add_argument("--chrome-trace", type=Path, help="its file; runs/step/NAME.trace.json where not given")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def _plan(parser: ArgumentParser, given: Namespace) -> Plan:
    """What to measure. Ends with an error where that cannot be."""
    sizes, effort = settings_of(given, Sizes), settings_of(given, Effort)
    if (
        effort.ranks < 2
        or effort.ranks % 2
        or any(size % effort.ranks for size in (sizes.dim, sizes.hidden_dim, sizes.experts))
    ):
        parser.error(f"--ranks must be even and divide --dim, --hidden-dim and --experts, got {effort.ranks}")
    if sizes.tokens > SEQUENCE and sizes.tokens % SEQUENCE:
        parser.error(f"--tokens must be a multiple of {SEQUENCE}, or at most as many, got {sizes.tokens}")
    if given.mbit is not None and (missing := missing_for_links()):
        parser.error(f"--mbit {given.mbit}: {missing}")
    names = [name for name in given.systems.split(",") if name]
    if unknown := set(names) - (SYSTEMS.keys() - {OURS}):
        parser.error(f"--systems may name {', '.join(SYSTEMS.keys() - {OURS})}, got {', '.join(sorted(unknown))}")
    missing = [name for name in names if not SYSTEMS[name].is_installed]
    for name in missing:
        print(f"{name} is left out: {SYSTEMS[name].needs} is not installed")
    links = None
    try:
        if given.mbit is not None:
            links = Links(num_ranks=effort.ranks, mbit=given.mbit, ranks_per_node=given.ranks_per_node)
    except ValueError as error:
        parser.error(str(error))
    return Plan(
        workload=Workload(sizes, given.routing),
        effort=effort,
        systems=tuple(name for name in names if name not in missing),
        links=links,
        chrome_trace=given.chrome_trace or Path(f"runs/step/{given.name}.trace.json"),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.large:
        parser.set_defaults(**asdict(LARGE))
        given = parser.parse_args(argv)
    plan, provenance = _plan(parser, given), collect_provenance()
    # Ranks run functions of other modules: started processes do not import the `__main__` of a package.
    with nullcontext() if plan.links is None else shaped(plan.links):
        is_alone = plan.links is None
        measured = run_ranks(measure, plan.effort.ranks, plan, init=is_alone, timeout_s=TIMEOUT_S)[0]
    traces = [read_trace(path) for path in given.popularity] or synthetic_traces(_NUM_TRACES)
    results: dict[str, Any] = {
        "sizes": asdict(plan.workload.sizes),
        "effort": asdict(plan.effort),
        "routing": plan.workload.routing,
        "links": None if plan.links is None else asdict(plan.links),
        **measured,
        "bytes_over_paper_16_ranks": bytes_over_paper(traces, _PAPERS_RANKS, _PAPERS_SLOTS),
    }
    print_tables(results)
    print(f"written to {write_result(given.name, provenance, results)} and {plan.chrome_trace}")
    if given.json:
        print(json.dumps(figures(results)))


if __name__ == "__main__":
    main()
