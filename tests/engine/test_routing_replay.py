"""Recording and replaying on W ranks: each its own tokens, and together they equal one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import run_ranks

STEPS = 3


def global_routing(step: int) -> dict[str, Tensor]:
    """Random experts for all tokens of a step; those of the first six are not recorded."""
    generator = torch.Generator().manual_seed(step)
    rows = {"1.experts": (dense.NUM_EXPERTS, dense.TOP_K), "2.experts": (3, 1)}
    routing = {}
    for name, (num_experts, top_k) in rows.items():
        routing[name] = torch.rand(dense.TOKENS, num_experts, generator=generator).argsort(-1)[:, :top_k]
        routing[name][:6] = -1
    return routing


def train() -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, list[int]]]]:
    """(weights, what the last forward recorded, popularity of each step) of training on replayed routing."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module = models.build(torch.float64, aux_loss_coef=0.1)
    slots = None if world_size == 1 else 4
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(slots_per_rank=slots, placement=models.RandomPolicy))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2))
    reader, popularity = sml.LoadReader(module), []

    def mine(tensor: Tensor) -> Tensor:
        return models.my_part(tensor, rank, world_size)

    for step in range(STEPS):
        x, target = (mine(t) for t in dense.batch(step, 0, torch.float64))
        with sml.replay_routing(module, {name: mine(ids) for name, ids in global_routing(step).items()}):
            out = checkpoint(model, x.requires_grad_(), use_reentrant=False)
        (F.mse_loss(out, target) + sml.auxiliary_loss(module)).backward()
        optimizer.step()
        optimizer.zero_grad()
        popularity.append({name: load.popularity_E.tolist() for name, load in reader.read().items()})
    with torch.no_grad(), sml.record_routing(module) as recorded:
        model(x)
    return engine.full_state_dict(), recorded, popularity


def test_two_ranks_train_on_a_recording_like_one_process_and_each_records_its_tokens() -> None:
    expected, recorded, popularity = train()
    results = run_ranks(train, 2)
    for state, _, counts in results:
        assert counts == popularity
        for name in expected:
            torch.testing.assert_close(state[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)
    for name, ids_TK in recorded.items():
        assert torch.equal(torch.cat([mine[name] for _, mine, _ in results]), ids_TK)
