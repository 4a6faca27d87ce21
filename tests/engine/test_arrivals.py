"""When a placement moves, weights that have not changed travel only to ranks that did not have their expert."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine import direct_exchange
from swiftmoe_lightning.placement import Forecast
from tests.engine import models
from tests.helpers import run_ranks

W, DIM, HIDDEN, E = 4, 8, 8, 5
STEPS, THAWS, FREEZES = 7, 3, 5
BYTES = 8
# Elements of an expert, of which W ranks own equally many rows.
ELEMENTS = {"gate_up_proj": 2 * HIDDEN * DIM, "down_proj": DIM * HIDDEN}


class Layers(nn.Module):
    """Three layers: half of the experts' weights frozen, all, none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moes = nn.ModuleList(sml.MoE(DIM, HIDDEN, E, 2) for _ in range(3)).double()
        self.freeze()

    def freeze(self) -> None:
        for parameter in (self.moes[0].experts.gate_up_proj, *self.moes[1].experts.parameters()):
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for moe in self.moes:
            x = x + moe(x)
        return x


class FirstGroupMoves(models.RandomPolicy):
    """The second of two groups keeps its first placement."""

    def place(self, forecast: Forecast) -> list[sml.Placement]:
        if dist.get_rank() < W // 2:
            return super().place(forecast)
        row = np.r_[np.arange(E), np.zeros(self.num_slots - E, dtype=int)]
        return self.placements_of([row for _ in forecast.popularity_LE], E)


def batch(step: int) -> Tensor:
    return torch.randn(32, DIM, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def change(module: Layers, step: int) -> None:
    """The second layer's experts train for two steps, then rest where they are."""
    if step == THAWS:
        module.moes[1].experts.requires_grad_(True)
    if step == FREEZES:
        module.freeze()


def pairs_of(placement: sml.Placement) -> set[tuple[int, int]]:
    return {(rank, e) for rank, row in enumerate(placement.table_Ws.tolist()) for e in row}


def sent(pairs: set[tuple[int, int]], num_elements: int, case: str) -> dict[str, int]:
    """Bytes that this rank sends so that each (rank, expert) of `pairs` of its group gets elements of the expert."""
    me = dist.get_rank()
    if case == "groups":
        others = sum(rank != me % 2 for rank, _ in pairs)
        # Each group owns half of the two parts, and sends it to the other for the experts of either's pairs.
        num_experts = len(of_all_groups({e for _, e in pairs}))
        return {"distribute": BYTES * num_elements // 2 * others, "gather": BYTES * num_elements // 4 * num_experts}
    if case == "nodes":
        node = me // 2
        others = len({(rank // 2, e) for rank, e in pairs if rank // 2 != node})
        inside = sum(rank // 2 == node and rank != me for rank, _ in pairs)
        return {"distribute": BYTES * (num_elements // 4 * others + num_elements // 2 * inside), "gather": 0}
    return {"distribute": BYTES * num_elements // 4 * sum(rank != me for rank, _ in pairs), "gather": 0}


def of_all_groups(experts: set[int]) -> set[int]:
    rows: list[Any] = [None] * W
    dist.all_gather_object(rows, experts)
    return set().union(*rows)


def train(case: str, policy: Any, direct: bool) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int], int]:
    """Weights after training, bytes sent, bytes expected, and how many of those were frozen weights'."""
    options = {"groups": {"expert_parallel_size": 2}, "nodes": {"exchange": "two_level"}}.get(case, {})
    config = sml.SwiftMoEConfig(slots_per_rank=4, placement=policy, **options)
    module = Layers()
    with patch.object(direct_exchange, "_LEAST_MESSAGE", 0 if direct else 1 << 30):
        engine = sml.SwiftMoEEngine(module, config, ranks_per_node=2 if case == "nodes" else None)
        model = engine.data_parallel()
        optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.5))
        expected, num_frozen = dict.fromkeys(("distribute", "gather"), 0), 0

        def expect(pairs: set[tuple[int, int]], num_elements: int) -> int:
            added = sent(pairs, num_elements, case)
            for phase, number in added.items():
                expected[phase] += number
            return sum(added.values())

        for layer in engine.layers:
            # The first forward fetches all: there is nothing that could stay.
            assert not layer.slots.arrivals(layer.placement).any()
            expect(pairs_of(layer.placement), sum(ELEMENTS.values()))
        for step in range(STEPS):
            change(module, step)
            before = [pairs_of(layer.placement) for layer in engine.layers]
            model(models.my_part(batch(step), dist.get_rank(), W)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for layer, had in zip(engine.layers, before, strict=True):
                has = pairs_of(layer.placement)
                for name, parameter in layer.experts.named_parameters():
                    if parameter.requires_grad:
                        expect(has, ELEMENTS[name])
                    else:
                        num_frozen += expect(has - had, ELEMENTS[name])
        engine.wait_for_weights()
        actual = {phase: engine.traffic[phase] for phase in expected}
        return engine.full_state_dict(), actual, expected, num_frozen


CASES = [
    ("flat", models.RandomPolicy, False),
    ("flat", models.RandomPolicy, True),
    ("nodes", models.RandomPolicy, False),
    ("nodes", models.RandomPolicy, True),
    ("groups", models.RandomPolicy, False),
    ("groups", FirstGroupMoves, True),
]


def train_all() -> list[Any]:
    return [train(*case) for case in CASES]


def train_alone() -> dict[str, Tensor]:
    module = Layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for step in range(STEPS):
        change(module, step)
        module(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.state_dict()


def test_frozen_weights_travel_to_new_ranks_alone_and_steps_equal_those_of_one_process() -> None:
    alone = train_alone()
    for results in run_ranks(train_all, W):
        for case, (state, actual, expected, num_frozen) in zip(CASES, results, strict=True):
            torch.testing.assert_close(
                state, alone, rtol=1e-11, atol=1e-12, msg=lambda text, case=case: f"{case}: {text}"
            )
            assert actual == expected, case
            assert num_frozen > 0, case
