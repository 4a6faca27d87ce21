"""torch.compile reaches up to the exchanges of tokens, and steps with other placements need no other graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swiftmoe_lightning as sml
from tests.engine import models
from tests.helpers import nightly, run_ranks

NUM_STEPS = 5
# What torch.compile must have in its graphs; the exchanges between them are no operators of ours.
COMPILED = {"route", "sort", "permute", "grouped_linear", "activate", "combine"}


class Graphs:
    """A backend that traces gradients, too, and keeps which of our operators are in its graphs."""

    def __init__(self) -> None:
        self.count = 0
        self.operators: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        self.operators |= {name.split(".")[1] for name in names if name.startswith("swiftmoe.")}
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def train(compiles: bool, capacity_factor: float | None) -> tuple[Tensor, int, bool, set[str], list[int]]:
    """The losses of all steps, how many placements there were, whether any assignment was dropped, the compiled
    operators, and how many graphs there were after each step."""
    rank, backend = dist.get_rank(), Graphs()
    torch.manual_seed(0)
    dim, experts, top_k = models.dense.DIM, models.dense.NUM_EXPERTS, models.dense.TOP_K
    moe = sml.MoE(dim, 8, experts, top_k, num_shared_experts=1, aux_loss_coef=0.1, capacity_factor=capacity_factor)
    model = torch.nn.Sequential(torch.nn.Linear(dim, dim), moe, torch.nn.Linear(dim, 3))
    config = sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=4)
    engine = sml.SwiftMoEEngine(model, config)
    optimizer = engine.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    forward = torch.compile(model, backend=backend) if compiles else model
    losses, placements, counts = [], set(), []
    for step in range(NUM_STEPS):
        x, target = (models.my_part(t, rank, 2) for t in models.dense.batch(step, 0, torch.float32))
        loss = (forward(x) - target).square().mean() + sml.auxiliary_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        placements.add(engine.layers[0].placement)
        counts.append(backend.count)
    load = moe.experts.trained_load.total
    drops = int(load.wanted_W.sum()) > int(load.load_W.sum())
    return torch.stack(losses), len(placements), drops, backend.operators, counts


@pytest.mark.parametrize("capacity_factor", [*nightly(None), 1.0])
def test_a_compiled_model_trains_the_same_under_changing_placements(capacity_factor: float | None) -> None:
    eager = run_ranks(train, 2, False, capacity_factor)
    compiled = run_ranks(train, 2, True, capacity_factor, timeout_s=180)
    for (expected, *_), (losses, num_placements, drops, operators, counts) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(losses, expected)
        assert num_placements == NUM_STEPS
        assert drops == (capacity_factor is not None)
        assert operators >= COMPILED
        assert counts[1:] == [counts[0]] * (NUM_STEPS - 1)
