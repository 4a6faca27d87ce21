"""Seconds of a step by system, of three kinds: the paper's, modelled for a stated cluster, measured on real ranks.

L layers, W ranks, E experts, G bytes of an expert, S steps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.common.provenance import RESULTS
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.systems import SYSTEMS
from benchmarks.convergence.training import Run
from swiftmoe_lightning.analysis.cost import Machine, step_seconds

STEP_TIMES: Final = RESULTS / "convergence.step_times.json"
# SYMI, table 3: minutes to loss 4.0 of GPT-Small, and how many steps fewer SYMI needs than each.
PAPER_MINUTES: Final = {
    "static": 147.84,
    "flexmoe-100": 145.42,
    "flexmoe-50": 141.60,
    "flexmoe-10": 138.61,
    "symi": 102.68,
}
_PAPER_FEWER_STEPS: Final = {"static": 0.285, "flexmoe-100": 0.156, "flexmoe-50": 0.121, "flexmoe-10": 0.0, "symi": 0.0}
# Of an iteration of SYMI: popularity all-reduce, placement, and the metadata of placements.
PAPER_NEW_PARTS: Final = {"GPT-Small": 0.0106, "GPT-Medium": 0.0082, "GPT-Large": 0.0070}
# Systems whose step is the paper's SYMI step: what they add to it is another rule for the same exchange.
_LIKE_SYMI: Final = ("packed", "balanced", "dropless")


def paper_step_times() -> dict[str, float]:
    """System -> its step time in the paper, in steps of static: minutes to the loss over steps to the loss."""
    steps = {system: 1 / (1 - fewer) for system, fewer in _PAPER_FEWER_STEPS.items()}
    times = {system: minutes / steps[system] for system, minutes in PAPER_MINUTES.items()}
    relative = {system: time / times["static"] for system, time in times.items()}
    return relative | {"deepspeed": 1.0} | dict.fromkeys(_LIKE_SYMI, relative["symi"])


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What steps are modelled for.

    Attributes:
        machine: ranks, links, bytes and operations of an expert.
        tokens_per_rank: of one step.
        num_layers: L.
        dense_seconds: of a step, outside the experts.
    """

    machine: Machine
    tokens_per_rank: int
    num_layers: int
    dense_seconds: float


def _paper_cluster() -> Cluster:
    """GPT-Small as the paper trains it: 16 A100 with 100 Gb/s each, 16 experts in each of 12 layers, 4 slots a rank, 64
    sequences of 512 tokens. Of an A100's 312 TFLOP/s 40 % are reached; dense gradients are all-reduced in 2 bytes."""
    dim, num_layers, tokens, vocabulary = 768, 12, 64 * 512 // 16, 50_257
    link_bytes, flops = 12.5e9, 0.4 * 312e12
    expert = 8 * dim**2
    dense = num_layers * 4 * dim**2 + vocabulary * dim
    machine = Machine(
        num_ranks=16,
        slots_per_rank=4,
        expert_bytes=2 * expert,
        link_bytes=link_bytes,
        flops=flops,
        assignment_bytes=2 * dim,
    )
    dense_seconds = 6 * dense * tokens / flops + 2 * 2 * dense * 15 / 16 / link_bytes
    return Cluster(machine=machine, tokens_per_rank=tokens, num_layers=num_layers, dense_seconds=dense_seconds)


PAPER_CLUSTER: Final = _paper_cluster()


def modelled_seconds(run: Run, setting: Setting, cluster: Cluster = PAPER_CLUSTER) -> np.ndarray:
    """[S] seconds of each step of a run, had the cluster trained with its loads and placements; nothing overlaps.

    Args:
        run: whose loads, pairs and moves they are. Systems that keep the state with the weights send every slot's, the
            paper's bound; the others what their placements need.
        setting: of the run.
        cluster: what it is modelled for.
    """
    machine, system = cluster.machine, SYSTEMS[run.system]
    bound = machine.slots_per_rank * (machine.num_ranks - 1) / machine.num_ranks
    seconds = []
    for load, busiest, moved in zip(run.largest_load, run.busiest, run.moved_pairs, strict=True):
        layer = step_seconds(
            load * cluster.tokens_per_rank * setting.top_k,
            bound if system.keeps_state_with_weights else busiest,
            moved / setting.num_layers if system.keeps_state_with_weights else 0.0,
            machine,
        )
        assert layer is not None
        seconds.append(cluster.num_layers * layer + cluster.dense_seconds)
    return np.array(seconds)


def measured_step_times(path: Path = STEP_TIMES) -> dict[str, float]:
    """System -> median step time on real ranks, in steps of static; empty where nothing was measured.

    Args:
        path: what `step_times` wrote.
    """
    if not path.exists():
        return {}
    ratios: dict[str, dict[str, float]] = json.loads(path.read_text())["capacity 1"]["step_time_over_static"]
    return {system: ratio["median"] for system, ratio in ratios.items()}


def recorded_step_times(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The links between the ranks -> what `step_times` wrote of runs with a capacity over them.

    Args:
        folder: where `step_times` writes.
    """
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{STEP_TIMES.stem}*.json"))]
    return {
        f"{each['mbit']} Mbit/s links" if each.get("mbit") else "loopback": each["capacity 1"]
        for each in contents
        if "capacity 1" in each
    }
