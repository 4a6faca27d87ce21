"""Which layers an optimizer's step updates and places: with several optimizers, frozen parts, parts that thaw."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.layer_state import LayerState
from swiftmoe_lightning.engine.stepped_layers import layers_stepped_by
from tests.engine import models
from tests.helpers import rank_errors, run_ranks

DIM, E = 6, 4


def tracked(index: int, name: str) -> LayerState:
    moe = sml.MoE(DIM, 4, E)
    return LayerState(index, name, moe.experts, moe.router)


def test_a_layer_follows_the_optimizer_of_its_experts_then_of_its_router_then_all() -> None:
    whole, routed, frozen = (tracked(i, name) for i, name in enumerate(["whole", "routed", "frozen"]))
    assert whole.router is not None
    assert routed.router is not None
    experts = SGD(whole.experts.parameters(), 0.1)
    routers = SGD([*whole.router.parameters(), *routed.router.parameters()], 0.1)
    dense = SGD(nn.Linear(2, 2).parameters(), 0.1)

    def ended(optimizer: Optimizer) -> list[str]:
        others = [o for o in (experts, routers, dense) if o is not optimizer]
        return [t.name for t in layers_stepped_by(optimizer, others, [whole, routed, frozen])]

    assert [ended(o) for o in (experts, routers, dense)] == [["whole", "frozen"], ["routed", "frozen"], ["frozen"]]
    # Unfrozen later.
    dense.add_param_group({"params": list(frozen.experts.parameters())})
    assert [ended(o) for o in (experts, routers, dense)] == [["whole"], ["routed"], ["frozen"]]


def train_around(frozen: tuple[str, ...], placement: object) -> tuple[list[list[int]], dict[str, int]]:
    """Four steps of a dense layer before an MoE of which some is frozen: its placement after each, and the traffic
    since the slots were first filled."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), sml.MoE(DIM, 5, E))
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(slots_per_rank=4, placement=placement))
    wrapped = engine.data_parallel()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = engine.prepare_optimizer(SGD(trained, lr=0.1))
    tables, first = [], {}
    for step in range(4):
        x = torch.randn(12, DIM, generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]
        loss = wrapped(x).square().mean()
        first = first or dict(engine.traffic)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tables.append(engine.placements["1.experts"].slot_to_expert_S.tolist())
    # The last step's weights are on their way: nobody leaves before they have come.
    wrapped.eval()(torch.zeros(1, DIM))
    return tables, {phase: sent - first[phase] for phase, sent in engine.traffic.items()}


@pytest.mark.parametrize("frozen", [("1.experts",), ("1.experts", "1.router")])
def test_frozen_experts_go_where_their_tokens_are(frozen: tuple[str, ...]) -> None:
    actual = run_ranks(train_around, 2, frozen, models.RandomPolicy)
    assert actual[0][0] == actual[1][0]
    assert len({tuple(table) for table in actual[0][0]}) > 1
    assert all(traffic["distribute"] > 0 == traffic["collect"] for _, traffic in actual)


def test_frozen_experts_that_stay_are_not_sent() -> None:
    for tables, traffic in run_ranks(train_around, 2, ("1.experts",), "static"):
        assert tables == tables[:1] * 4
        assert traffic == {"collect": 0, "reduce": 0, "gather": 0, "distribute": 0, "recut": 0, "update": 0}


def thaw(world: int) -> dict[str, Tensor]:
    """Two steps over frozen experts, then two with them in a parameter group that was added."""
    rank = dist.get_rank() if world > 1 else 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), sml.MoE(DIM, 5, E)).double()
    experts = model[1].experts.requires_grad_(False)
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(slots_per_rank=4, placement=models.RandomPolicy))
    wrapped = engine.data_parallel(find_unused_parameters=True) if world > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = engine.prepare_optimizer(AdamW(trained, lr=0.1))
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": list(experts.requires_grad_(True).parameters()), "lr": 0.05})
        x = torch.randn(12, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        wrapped(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


@pytest.mark.parametrize("world_size", [2, 3])
def test_experts_that_thaw_during_training_are_trained(world_size: int) -> None:
    expected = thaw(1)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(DIM, DIM), sml.MoE(DIM, 5, E)).double().state_dict()
    for actual in run_ranks(thaw, world_size, world_size):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12, msg=name)
            assert not torch.equal(value, start[name]), name


def train_unprepared() -> None:
    model = sml.MoE(DIM, 5, E)
    wrapped = sml.SwiftMoEEngine(model).data_parallel()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        wrapped(torch.randn(6, DIM)).square().mean().backward()
        optimizer.step()


def write_by_hand(marks: bool) -> tuple[Tensor, Tensor]:
    """What the layer gives after its output matrix was set to zero: zero."""
    model = sml.MoE(DIM, 5, E)
    engine = sml.SwiftMoEEngine(model)
    wrapped, x = engine.data_parallel(), torch.randn(6, DIM)
    before = wrapped(x)
    with torch.no_grad():
        nn.init.zeros_(model.experts.down_proj)  # type: ignore[arg-type]
    if marks:
        engine.mark_stale()
    return before.detach(), wrapped(x).detach()


def test_a_step_of_an_optimizer_that_was_not_prepared_is_an_error() -> None:
    for error in rank_errors(train_unprepared, 2):
        assert "not by an optimizer that this engine prepared. Pass every optimizer through" in error


def test_a_write_by_hand_has_to_be_marked() -> None:
    for error in rank_errors(write_by_hand, 2, False):
        assert "after a write by hand call engine.mark_stale()" in error
    for before, after in run_ranks(write_by_hand, 2, True):
        assert before.abs().min() > 0 == after.abs().max()
