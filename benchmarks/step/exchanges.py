"""Both weight phases alone: ours at our placement beside the paper's way at the paper's, and bytes against plans.

P (rank, expert) pairs, W ranks, G bytes of one expert, L layers, E experts, s slots of a rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common.across_ranks import slowest, total
from benchmarks.common.interleaved import interleaved
from benchmarks.common.spread import median_of, pair_ratios, spread
from benchmarks.step.paper_way import PaperLayer, RegisteredGroups, run_both_phases
from benchmarks.step.training import TrainingSystem
from swiftmoe_lightning import Experts, LoadReader, Placement, SwiftMoEEngine
from swiftmoe_lightning.analysis import Machine, PlanOptions, Trace, make_plan
from swiftmoe_lightning.analysis.cost import paper_bytes
from swiftmoe_lightning.placement import Forecast, make_policy, plan_collection, plan_distribution

_PAPERS: Final = "symi"
_WARM_UP: Final = 2


def expert_shapes(engine: SwiftMoEEngine) -> list[tuple[int, ...]]:
    """The shape of each tensor of one expert, rows first; those of all layers are equal."""
    experts = next(module for module in engine.module.modules() if isinstance(module, Experts))
    return [tuple(parameter.shape[1:]) for parameter in experts.expert_parameters().values()]


def check_bytes(system: TrainingSystem, steps: int) -> dict[str, Any]:
    """Bytes counted on the wire against the plans, rank by rank and step by step, and their sum over ranks against
    G * (P - P / W) a layer and phase. A collective.

    Raises AssertionError where they differ. W must divide the rows of an expert's tensors.
    """
    engine, rank, world_size = system.engine, dist.get_rank(), dist.get_world_size()
    assert engine is not None
    row_elements = [(shape[0], int(np.prod(shape[1:]))) for shape in expert_shapes(engine)]
    elements, size = sum(rows * columns for rows, columns in row_elements), torch.float32.itemsize
    plans = {"collect": plan_collection, "distribute": plan_distribution}
    system.set_adapting(every_step=True)
    system.step()
    counted, formula = [], []
    for _ in range(steps):
        system.wait_for_weights()
        before, placements = engine.traffic, {"collect": engine.placements}
        system.step()
        system.wait_for_weights()
        placements["distribute"] = engine.placements
        for phase, plan in plans.items():
            sent = engine.traffic[phase] - before[phase]
            in_phase = placements[phase].values()
            planned = size * sum(plan(placement, row_elements).elements_sent(rank) for placement in in_phase)
            assert sent == planned, (phase, rank, sent, planned)
            num_pairs = sum(placement.num_pairs for placement in in_phase)
            counted.append(float(sent))
            formula.append(size * elements * num_pairs * (world_size - 1) / world_size)
    all_ranks = total(counted)
    assert all_ranks == formula, (all_ranks, formula)
    return {
        "steps_checked": steps,
        "elements_per_expert": elements,
        "num_pairs": num_pairs,
        "collect_all_ranks": all_ranks[-2],
        "distribute_all_ranks": all_ranks[-1],
        "formula_all_ranks": formula[-1],
    }


def compare_with_paper(system: TrainingSystem, repeats: int) -> dict[str, Any]:
    """Both weight phases, without a step around them, ours over the paper's way. A collective.

    Ours starts with gradients in the slots and ends with the next weights in them; it includes the next placement. The
    paper's placements are made from the popularity of one of the same steps.

    Args:
        system: ours, in training.
        repeats: measurements of each.
    """
    engine = system.engine
    assert engine is not None
    shapes, machine = expert_shapes(engine), _machine(engine)
    placements = _papers_placements(system)
    groups = RegisteredGroups()
    layers = [PaperLayer(placement, shapes, groups) for placement in placements]
    sent: list[float] = []

    def run_ours() -> float:
        before = sum(engine.traffic.values())
        seconds = _our_phases(system)
        sent.append(float(sum(engine.traffic.values()) - before))
        return seconds

    ours, theirs = interleaved(
        run_ours, lambda: _timed(lambda: run_both_phases(layers)), max(repeats // 2, 1), _WARM_UP
    )
    (papers,) = total([sum(layer.bytes_sent for layer in layers) / len(sent)])
    by_formula = sum(paper_bytes(p.num_pairs, p.num_experts, machine) for p in placements)
    assert papers == by_formula, f"the paper's way sent {papers} bytes, and by its formula {by_formula}"
    ours, theirs = slowest(ours), slowest(theirs)
    return {
        "time": median_of(pair_ratios(ours, theirs).tolist()),
        "bytes": median_of([value / papers for value in total(sent)]),
        "ours_ms": spread(1e3 * np.array(ours)),
        "papers_ms": spread(1e3 * np.array(theirs)),
        "papers_bytes": papers,
    }


def _machine(engine: SwiftMoEEngine) -> Machine:
    placement = next(iter(engine.placements.values()))
    expert_bytes = torch.float32.itemsize * sum(int(np.prod(shape)) for shape in expert_shapes(engine))
    return Machine(num_ranks=placement.world_size, slots_per_rank=placement.slots_per_rank, expert_bytes=expert_bytes)


def _papers_placements(system: TrainingSystem) -> list[Placement]:
    assert system.engine is not None
    reader = LoadReader(system.engine.module)
    system.step()
    system.wait_for_weights()
    popularity_LE = np.stack([load.popularity_E for load in reader.read().values()])
    machine = _machine(system.engine)
    return list(make_policy(_PAPERS, machine.num_ranks, machine.slots_per_rank).place(Forecast.of(popularity_LE)))


def _our_phases(system: TrainingSystem) -> float:
    """Seconds of our two phases, after a backward that has left the gradients in the slots."""
    engine = system.engine
    assert engine is not None
    with engine.no_sync():
        system.forward().backward()

    def run() -> None:
        engine.collect()
        engine.after_update()
        system.wait_for_weights()

    seconds = _timed(run)
    system.optimizer.zero_grad()
    return seconds


def _timed(run: Any) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bytes_over_paper(traces: Sequence[Trace], num_ranks: int, slots_per_rank: int) -> dict[str, Any]:
    """Bytes of both phases by the plan, ours at "balanced" over the paper's way at "symi": one ratio a trace.

    Args:
        traces: popularity, step by step.
        num_ranks: W.
        slots_per_rank: s.
    """
    machine, options = (
        Machine(num_ranks=num_ranks, slots_per_rank=slots_per_rank),
        PlanOptions(policies=("balanced", _PAPERS)),
    )
    ratios = []
    for trace in traces:
        outcomes = make_plan(trace, machine, options).outcomes
        ours = outcomes["balanced"].bytes_gradients + outcomes["balanced"].bytes_weights
        ratios.append(ours / outcomes[_PAPERS].bytes_paper)
    return median_of(ratios)


def synthetic_traces(number: int, steps: int = 60, experts: int = 16) -> list[Trace]:
    """Popularity that wanders: scores of experts are random walks that are drawn back to zero, and each step's tokens
    are drawn by their softmax. The shares of one trace are more uneven than those of the one before.

    Args:
        number: of traces.
        steps: of each.
        experts: E, in two layers.
    """
    traces = []
    for index in range(number):
        draw = np.random.default_rng(index)
        spread_of_scores = 0.5 + index / max(number - 1, 1)
        scores_LE = draw.normal(0, spread_of_scores, (2, experts))
        counts = []
        for _ in range(steps):
            scores_LE = 0.98 * scores_LE + draw.normal(0, 0.2 * spread_of_scores, scores_LE.shape)
            shares_LE = np.exp(scores_LE)
            shares_LE /= shares_LE.sum(1, keepdims=True)
            counts.append([draw.multinomial(4096, shares_E) for shares_E in shares_LE])
        traces.append(Trace(np.array(counts)[:, None]))
    return traces
