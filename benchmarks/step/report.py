"""The step benchmark's tables, and its last line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# Key of the last line -> the system whose step is the measure.
_OVER: Final = {"over_deepspeed": "deepspeed", "over_hf_ep": "hf_ep", "over_fsdp2": "fsdp2", "over_ddp": "ddp"}
_PAPERS_RANKS: Final = 16


def figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the last line: median, least, most and number of runs of each; None for what was not measured.

    Args:
        results: what was written.
    """
    systems = results["systems"]
    return {
        "adapt_over_frozen": results["adapting"]["ratio"],
        "control_fraction": results["control_fraction"],
        "weight_phases_fraction": results["weight_phases_fraction"],
        "bytes_over_paper": results["paper"]["bytes"],
        f"bytes_over_paper_{_PAPERS_RANKS}_ranks": results["bytes_over_paper_16_ranks"],
        "time_over_paper": results["paper"]["time"],
        **{key: systems[name]["ours_over_it"] if name in systems else None for key, name in _OVER.items()},
    }


def print_tables(results: Mapping[str, Any]) -> None:
    """Print the results."""
    _print_systems(results["systems"])
    print(f"\n{'figure':28} {'median':>8} {'least':>8} {'most':>8} {'runs':>5}")
    rows = {**figures(results), "control: kept / kept": results["control"]["ratio"]}
    for name, figure in rows.items():
        if figure is None:
            print(f"{name:28} {'-':>8}")
        else:
            print(f"{name:28} {figure['median']:8.4f} {figure['min']:8.4f} {figure['max']:8.4f} {figure['runs']:5}")
    for clock in ("wall", "cpu"):
        ratio = results["update"][f"{clock}_ratio"]
        between = f"{ratio['low']:.3f}..{ratio['high']:.3f}"
        print(f"update, prepared / stock AdamW, {clock} time: {ratio['median']:.3f} ({between})")
    total = sum(ms["median"] for ms in results["phases_ms"].values())
    print(f"\n{'phase of our step':20} {'ms':>8} {'share':>7}")
    for name, ms in sorted(results["phases_ms"].items(), key=lambda item: -item[1]["median"]):
        print(f"{name:20} {ms['median']:8.2f} {ms['median'] / total:7.1%}")
    paper = results["paper"]
    print(
        f"\nboth weight phases alone: ours {paper['ours_ms']['median']:.1f} ms, the paper's way "
        f"{paper['papers_ms']['median']:.1f} ms"
    )
    sent = results["bytes"]
    print(
        f"bytes a step, all ranks: collect {sent['collect_all_ranks']:.0f}, distribute "
        f"{sent['distribute_all_ranks']:.0f}, by the formula {sent['formula_all_ranks']:.0f}; counted and planned were "
        f"equal on each rank in each of {sent['steps_checked']} steps"
    )


def _print_systems(systems: Mapping[str, Any]) -> None:
    has_links = any("link_bytes_per_step" in system for system in systems.values())
    header = (
        f"{'step, beside ours':18} {'ms':>8} {'ours, ms':>9} {'ours / it':>9} {'least..most':>15} {'imbalance':>10}"
    )
    print(f"\n{header} {'MB weights':>11}" + (f" {'MB on links':>12} {'of ours':>9}" if has_links else ""))
    for name, system in systems.items():
        ratio = system["ours_over_it"]
        between = f"{ratio['min']:.3f}..{ratio['max']:.3f}"
        line = f"{name:18} {system['step_ms']['median']:8.1f} {system['ours']['step_ms']['median']:9.1f} "
        line += f"{ratio['median']:9.3f} {between:>15} "
        line += f"{system['imbalance']:10.3f} " if "imbalance" in system else f"{'-':>10} "
        line += f"{system['ours']['imbalance']:8.3f} "
        line += f"{system['weight_bytes_per_step'] / 1e6:11.2f}" if "imbalance" in system else f"{'-':>11}"
        if has_links:
            line += f" {system['link_bytes_per_step'] / 1e6:12.2f} {system['ours']['link_bytes_per_step'] / 1e6:9.2f}"
        print(line)
