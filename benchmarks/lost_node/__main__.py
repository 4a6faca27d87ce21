"""Seconds that `MemoryCheckpoint` takes of a step, and that a run takes to go on after a lost node.

saves   two gloo ranks with a folder each, as on two nodes, save parameters and AdamW's state of MoE layers in float32:
        held_up_s       until `save` returns, after the save before was whole: what a step waits for
        whole_s         until both copies are there: a save every so many seconds is behind the steps
        directory_s     a checkpoint directory in the same memory, written by `save_directory`, which all ranks wait for
        load_s          to read it again, of which each node has all parts
        megabytes       a rank's part
go_on   examples/go_on_after_a_lost_node.py: 2 agents of torchrun with 2 ranks each, one killed in step 13:
        steps_lost      of those that were trained
        restart_s       from the kill until the agent that is left starts the script again
        next_step_s     from the kill until 2 ranks have trained a step anew

Folders are in /dev/shm. held_up_s and directory_s are measured alternately, and their ratio is given. Writes
benchmarks/results/NAME.json, and prints it as tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.common.command_line import add_settings, command_line, settings_of
from benchmarks.common.provenance import ROOT, collect_provenance, write_result
from benchmarks.lost_node.saves import MEMORY, Sizes, measure_saves
from tests.helpers import run_script

EXAMPLE: Final = ROOT / "examples" / "go_on_after_a_lost_node.py"
_NODE: Final = Path(__file__).with_name("node.py")


def lose_a_node() -> dict[str, float]:
    """One run of the example, with the moments of its steps written down."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        moments = f"{folder}/moments"
        code = f"import runpy; runpy.run_path({str(EXAMPLE)!r})['run_nodes']({str(_NODE)!r}, {folder!r}, {moments!r})"
        run_script(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT))
        lines = [line.split() for line in Path(moments).read_text().splitlines()]
    killed_at = next(float(moment) for kind, _, moment in lines if kind == "killed")
    last = max(int(step) for kind, step, moment in lines if kind == "4" and float(moment) < killed_at)
    started_at = max(float(moment) for kind, _, moment in lines if kind == "started")
    step, moment = next((int(step), float(moment)) for kind, step, moment in lines if kind == "2")
    return {"steps_lost": last + 1 - step, "restart_s": started_at - killed_at, "next_step_s": moment - killed_at}


def print_tables(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    saves = results["saves"]
    print(f"saves, {saves['megabytes']:.0f} MB a rank")
    for name in ("held_up_s", "whole_s", "directory_s", "load_s"):
        print(f"  {name:22} {saves[name]['median']:8.3f}")
    ratio = saves["held_up_over_directory"]
    print(f"  held_up_over_directory {ratio['median']:8.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})")
    for loss in results["go_on"]:
        print(
            f"lost node: {loss['steps_lost']} trained steps lost, started again after {loss['restart_s']:.1f} s, "
            f"next step after {loss['next_step_s']:.1f} s"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("lost_node", __doc__)
    add_settings(parser, Sizes)
    parser.add_argument("--losses", type=int, default=5, help="lost nodes; 0 measures saves alone")
    arguments = parser.parse_args(argv)
    sizes = settings_of(arguments, Sizes)
    provenance = collect_provenance()
    saves = measure_saves(sizes)
    results = {"sizes": asdict(sizes), "saves": saves, "go_on": [lose_a_node() for _ in range(arguments.losses)]}
    print_tables(results)
    print(f"written to {write_result(arguments.name, provenance, results)}")


if __name__ == "__main__":
    main()
