"""Ranks with differently many real tokens train, with each router, as one process does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import swiftmoe_lightning as sml
from tests.engine.models import my_part
from tests.helpers import run_ranks

DIM, EXPERTS, TOP_K, VOCAB, TOKENS, STEPS, RANKS = 6, 6, 2, 11, 20, 3, 2

# Each token's experts do not depend on other tokens: the global batch in one process.
BY_TOKEN = {
    "top-k": lambda: sml.TopKRouter(DIM, EXPERTS, TOP_K),
    "group-limited": lambda: sml.GroupLimitedRouter(
        DIM, EXPERTS, TOP_K, num_groups=3, top_k_groups=2, score="sigmoid", bias_update_rate=0.05, scaling_factor=2.5
    ),
    "clustered": lambda: sml.ClusteredRouter(DIM, EXPERTS, TOP_K, num_groups=2, score="sigmoid", bias_update_rate=0.05),
    "hash": lambda: sml.HashRouter(DIM, EXPERTS, TOP_K, vocab_size=VOCAB),
}
# Each rank's tokens compete among themselves: its part by itself.
BY_RANK = {
    "sinkhorn": lambda: sml.SinkhornRouter(DIM, EXPERTS, TOP_K),
    "expert choice": lambda: sml.ExpertChoiceRouter(DIM, EXPERTS, TOP_K),
}
ROUTERS = BY_TOKEN | BY_RANK


class Model(nn.Module):
    """Linear, x + MoE(x), linear."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)
        router = ROUTERS[name]()
        nn.init.normal_(router.weight)
        options |= {"z_loss_coef": 0.01} if name in BY_TOKEN else {}
        self.moe = sml.MoE(DIM, 5, EXPERTS, TOP_K, router=router, num_shared_experts=1, **options)
        self.double()

    def forward(self, x_TD: Tensor, mask_T: Tensor, ids_T: Tensor) -> Tensor:
        x_TD = self.inner(x_TD)
        return self.outer(x_TD + self.moe(x_TD, mask_T, ids_T, ids_T % 2))


def batch(step: int) -> list[Tensor]:
    """Inputs, mask, token ids and targets of the global batch: rank 0 has 9 real tokens, rank 1 has 3."""
    generator = torch.Generator().manual_seed(step)
    x_TD = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64)
    ids_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    mask_T = torch.tensor([True] * 9 + [False] * 8 + [True] * 3)
    return [x_TD, mask_T, ids_T, torch.randn(TOKENS, 3, generator=generator, dtype=torch.float64)]


def loss_of(model: nn.Module, module: nn.Module, x: Tensor, mask: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    return (model(x, mask, ids) - target).square().mean() + sml.auxiliary_loss(module)


def train(name: str) -> dict[str, Tensor]:
    """The state after a few steps; one process takes the global batch, or the ranks' parts one after the other."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module = Model(name, aux_loss_coef=0.1 if name in BY_TOKEN else 0.0)
    engine = sml.SwiftMoEEngine(module)
    model = engine.data_parallel() if world_size > 1 else module
    if isinstance(model, DistributedDataParallel):
        # A buffer that DDP sent around in each forward would need equally many batches in evaluation.
        assert model.parameters_to_ignore.issuperset(n for n, _ in module.named_buffers())
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2))
    for step in range(STEPS):
        if world_size > 1:
            parts = [[my_part(t, rank, world_size) for t in batch(step)]]
        elif name in BY_TOKEN:
            parts = [batch(step)]
        else:
            parts = [[my_part(t, r, RANKS) for t in batch(step)] for r in range(RANKS)]
        for part in parts:
            (loss_of(model, module, *part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


def all_of_it() -> tuple[dict[str, dict[str, Tensor]], list[int]]:
    """The states of all routers' runs; and with a capacity, how many tokens were dropped with padding and without."""
    states = {name: train(name) for name in ROUTERS}
    module = Model("top-k", capacity_factor=0.7)
    sml.SwiftMoEEngine(module)
    reader, drops = sml.LoadReader(module), []
    x_TD, mask_T, *_ = (my_part(t, dist.get_rank(), RANKS) for t in batch(0))
    for inputs in ((x_TD, mask_T), (x_TD[mask_T],)):
        module.moe(*(t.requires_grad_() if t.is_floating_point() else t for t in inputs)).sum().backward()
        (load,) = reader.read().values()
        drops.append(load.num_dropped_tokens)
    return states, drops


def test_two_ranks_equal_one_process_with_each_router_and_a_mask() -> None:
    expected = {name: train(name) for name in ROUTERS}
    for states, drops in run_ranks(all_of_it, RANKS):
        assert drops[0] == drops[1] > 0
        for name, state in states.items():
            assert state.keys() == expected[name].keys()
            for key, value in expected[name].items():
                error = float((state[key].double() - value.double()).norm())
                assert error <= 1e-12 * float(value.double().norm()), (name, key)
