"""A replay of a run's recording gives the loads, drops and placements of the run itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.analysis import Machine, PlanOptions, Replay, Rules, Sizes, Trace, make_plan, read_trace, replay
from swiftmoe_lightning.placement import Capacity, Placement, make_policy
from tests.helpers import nightly, run_ranks
from tests.strategies.cases import DIM, GLOBAL_BATCH, NUM_BATCHES, Model, loader, trainer

W, E, EPOCHS = 4, 5, 4
NUM_STEPS = EPOCHS * NUM_BATCHES


class Three(Model):
    """Two more MoE layers, one of top-1 and one with a router that is trained to change its mind."""

    def __init__(self, **moe_options: Any) -> None:
        super().__init__(**moe_options)
        self.second = sml.MoE(DIM, 10, E, 1, **moe_options)
        self.third = sml.MoE(DIM, 10, E, 2, aux_loss_coef=1.0, **moe_options)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        for layer in (self.moe, self.second, self.third):
            hidden = hidden + layer(hidden)
        out: Tensor = self.outer(hidden)
        return out


class Scripted(nn.Module):
    """A router with given results: ids[step] are [T, K] expert ids, the same for each rank's tokens."""

    def __init__(self, ids: list[list[list[int]]]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.ids, self.num_steps = ids, 0

    def forward(self, x_TD: Tensor) -> sml.RouterOutput:
        ids_TK = torch.tensor(self.ids[self.num_steps % len(self.ids)])
        self.num_steps += self.training
        probs_TE = torch.full((len(x_TD), E), 1 / E)
        return sml.RouterOutput(ids_TK, self.scale.expand(ids_TK.shape), probs_TE, probs_TE)


# Two experts have nearly all of a rank's twelve assignments, two others in the next step.
JUMPING = [[[a, b]] * 5 + [[b, c]] for a, b, c in ((0, 3, 2), (1, 2, 0))]
# Experts 0 and 1 are always hot; in each step another one of the rest has twice as many assignments as the others.
TURNING = [[[0, 1], [0, 1], [0, a], [0, a], [1, b], [1, c]] for a, b, c in ((2, 3, 4), (3, 4, 2), (4, 2, 3))]


class WithScript(Three):
    """The first layer routes by given expert ids."""

    def __init__(self, ids: list[list[list[int]]], **moe_options: Any) -> None:
        super().__init__(**moe_options)
        self.moe = sml.MoE(DIM, 10, E, router=Scripted(ids), **moe_options)


class Alternates(Three):
    """The second layer is used by odd batches alone, and the third by the first half of each epoch."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self.moe(self.inner(batch[0])).square().mean()
        if index % 2:
            loss = loss + self.second(batch[0]).square().mean()
        if index < NUM_BATCHES // 2:
            loss = loss + self.third(batch[0]).square().mean() + sml.auxiliary_loss(self)
        return loss


def fit(make: Callable[[], Model], path: Path, options: dict[str, Any]) -> None:
    strategy = sml.SwiftMoEStrategy(**options)
    runner = trainer(W, strategy, max_epochs=EPOCHS, callbacks=[sml.PlacementRecorder(path)])
    runner.fit(make(), loader(W), loader(W, GLOBAL_BATCH))


def recorded(make: Callable[[], Model], folder: Path, **options: Any) -> Trace:
    """The trace of a fit on W ranks."""
    path = folder / "trace.npz"
    run_ranks(fit, W, make, path, options, init=False)
    return read_trace(path)


def replayed(trace: Trace, placement: str = "balanced", **rules: Any) -> Replay:
    slots_per_rank = trace.metadata["slots_per_rank"]
    return replay(trace.popularity_ULE, make_policy(placement, W, slots_per_rank), Rules(**rules))


def assert_same(replayed_run: Replay, trace: Trace) -> None:
    """Loads, drops, replicas and moves of every step and layer, to the last assignment."""
    arrays = {
        "loads": replayed_run.load_ULW,
        "dropped": replayed_run.dropped_UL,
        "replicas": replayed_run.replicas_ULE,
        "moved": replayed_run.moved_UL,
    }
    assert trace.recorded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, trace.recorded[name], err_msg=name)


CAPPED = {"capacity_factor": 1.0}


@pytest.mark.parametrize("placement", ["balanced", *nightly("packed")])
@pytest.mark.parametrize("moe_options", [CAPPED, {}], ids=["capped", "dropless"])
def test_a_replay_gives_the_runs_own_numbers(tmp_path: Path, placement: str, moe_options: dict[str, Any]) -> None:
    options = {} if placement == "balanced" else {"placement": placement}
    trace = recorded(partial(Three, **moe_options), tmp_path, **options)
    assert trace.popularity_ULE.shape == (NUM_STEPS, 3, E)
    assert (trace.recorded["dropped"].sum() > 0) == bool(moe_options)
    assert trace.recorded["moved"].sum() > 0
    sizes = Sizes.of(trace, None, None, None)
    assert (sizes.num_ranks, sizes.slots_per_rank, sizes.capacity_factor) == (W, 3, moe_options.get("capacity_factor"))
    capacity = Capacity(1.0) if moe_options else None
    assert_same(replayed(trace, placement, capacity=capacity), trace)
    machine = Machine(num_ranks=sizes.num_ranks, slots_per_rank=sizes.slots_per_rank)
    plan = make_plan(trace, machine, PlanOptions(policies=[placement], capacity_factor=sizes.capacity_factor))
    assert_same(plan.outcomes[placement].replay, trace)


def test_the_papers_rule_with_a_budget_for_each_slot_is_replayed_exactly(tmp_path: Path) -> None:
    make = partial(Three, capacity_factor=1.0, capacity_per="slot")
    trace = recorded(make, tmp_path, placement="symi", slots_per_rank=2)
    assert trace.recorded["dropped"].sum() > 0
    assert trace.recorded["moved"].sum() > 0
    # A plan judges "symi" with the even split; with a budget for each slot the run's "balanced" is the same.
    for split in ("balanced", "uniform"):
        assert_same(replayed(trace, "symi", split=split, capacity=Capacity(1.0, "slot")), trace)


@pytest.mark.parametrize(
    ("moe_options", "options", "rules"),
    [
        *nightly((CAPPED, {"replace_every": 2}, {"interval": 2})),
        (CAPPED, {"replace_every": "auto"}, {"interval": "auto"}),
        *nightly(({}, {"replace_every": "auto"}, {"interval": "auto"})),
        (CAPPED, {"replace_every": 3}, {"interval": 3}),
    ],
    ids=["every second step", "auto", "auto, dropless", "every third step"],
)
def test_a_replay_keeps_to_the_runs_cadence(
    tmp_path: Path, moe_options: dict[str, Any], options: dict[str, Any], rules: dict[str, Any]
) -> None:
    trace = recorded(partial(WithScript, TURNING, **moe_options), tmp_path, **options)
    capacity = Capacity(1.0) if moe_options else None
    assert_same(replayed(trace, capacity=capacity, **rules), trace)
    # These settings make a difference to the run.
    assert (replayed(trace, capacity=capacity).moved_UL != trace.recorded["moved"]).any()


def test_uniform_replicas_take_over_in_the_replay_when_they_did_in_the_run(tmp_path: Path) -> None:
    trace = recorded(partial(WithScript, JUMPING, **CAPPED), tmp_path, replace_every=2, slots_per_rank=2)
    rules = Rules(capacity=Capacity(1.0), interval=2)
    assert_same(replay(trace.popularity_ULE, make_policy("balanced", W, 2), rules), trace)
    policy = make_policy("balanced", W, 2)
    policy.has_uniform_fallback = False  # type: ignore[misc]
    without_fallback = replay(trace.popularity_ULE, policy, rules)
    fell_back_U = (without_fallback.replicas_ULE != trace.recorded["replicas"]).any(2)[:, 0]
    uniform_E = Placement.uniform(E, W, 2).replica_counts_E
    assert fell_back_U.any()
    assert (trace.recorded["replicas"][fell_back_U, 0] == uniform_E).all()


@pytest.mark.parametrize("interval", [*nightly(2), "auto"])
def test_layers_that_a_step_did_not_use_wait_in_the_replay_as_in_the_run(tmp_path: Path, interval: int | str) -> None:
    trace = recorded(Alternates, tmp_path, replace_every=interval, find_unused_parameters=True)
    replayed_run, is_used_UL = replayed(trace, interval=interval), trace.popularity_ULE.any(2)
    assert is_used_UL.mean(0).tolist() == [1, 0.5, 0.5]
    np.testing.assert_array_equal(replayed_run.load_ULW, trace.recorded["loads"])
    for layer, is_used_U in enumerate(is_used_UL.T):
        replicas, moved = (trace.recorded[name][is_used_U, layer] for name in ("replicas", "moved"))
        np.testing.assert_array_equal(replayed_run.replicas_ULE[is_used_U, layer], replicas)
        # The recorder sees a move when the layer is used again.
        moved_so_far = replayed_run.moved_UL[:, layer].cumsum()[is_used_U]
        np.testing.assert_array_equal(np.diff(moved_so_far, prepend=0), moved)
