"""Losses of DeepSpeed's own MoE layer on real ranks, and of the emulated "deepspeed" system, with top-1 and with top-2:
they must be equal.

python -m benchmarks.convergence.deepspeed_layer

It needs deepspeed, which is not among the project's dependencies (`pip install --no-build-isolation deepspeed`), and
writes results/deepspeed_layer.json, with which a test compares the emulation.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.convergence.cluster import EmulatedCluster
from benchmarks.convergence.systems import DEEPSPEED_MIN_CAPACITY, SYSTEMS
from swiftmoe_lightning import MoE
from tests.helpers import run_ranks

NUM_RANKS: Final = 2
NUM_STEPS: Final = 20
TOP_KS: Final = (1, 2)
CAPACITY_FACTOR: Final = 1.0
_VOCABULARY, _DIM, _HIDDEN_DIM, _EXPERTS, _TOKENS = 64, 32, 64, 4, 64
_LR: Final = 1e-2


class OneLayer(nn.Module):
    """A MoE layer between an embedding and a head: [T] int64 -> [T, V] logits.

    Args:
        moe: [T, D] -> [T, D].
    """

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(_VOCABULARY, _DIM), nn.Linear(_DIM, _VOCABULARY, bias=False)
        self.moe = moe

    def forward(self, ids_T: Tensor) -> Tensor:
        """[T] int64 -> [T, V]."""
        x_TD = self.embedding(ids_T)
        logits_TV: Tensor = self.head(x_TD + self.moe(x_TD))
        return logits_TV


def make_model(top_k: int) -> OneLayer:
    """Our layer, from one seed."""
    torch.manual_seed(0)
    moe = MoE(_DIM, _HIDDEN_DIM, _EXPERTS, top_k, activation="gelu")
    model = OneLayer(moe)
    # Tokens that differ in how much they like an expert, so that there is something to drop.
    nn.init.normal_(moe.router.weight, std=0.3)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and what they are to give, [W * T] int64 each, one rank's after the other's."""
    draw = np.random.default_rng(step)
    ids = torch.from_numpy(draw.zipf(1.3, NUM_RANKS * _TOKENS) % _VOCABULARY)
    return ids, (5 * ids + 3) % _VOCABULARY


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of both."""
    return torch.optim.AdamW(model.parameters(), _LR)


class _SeededCluster(EmulatedCluster):
    """Draws what DeepSpeed's ranks draw: each from its own seed, anew in every step."""

    step = 0

    def draw(self, shape: tuple[int, int, int]) -> Tensor:
        seeds = (self.step * NUM_RANKS + rank for rank in range(NUM_RANKS))
        return torch.stack([torch.rand(shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def emulated(top_k: int) -> dict[str, list[float]]:
    """Losses of our layer, all ranks in this process, and the share of assignments that each step dropped."""
    model = make_model(top_k)
    cluster = _SeededCluster(model, SYSTEMS["deepspeed"], NUM_RANKS, _EXPERTS // NUM_RANKS, CAPACITY_FACTOR, seed=0)
    optimizer = optimizer_of(model)
    losses, dropped = [], []
    for cluster.step in range(NUM_STEPS):
        ids, wanted = batch(cluster.step)
        loss = F.cross_entropy(model(ids), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        dropped.append(1 - cluster.loads["moe"].token_survival_rate)
    return {"losses": losses, "dropped": dropped}


class _DeepSpeedMoE(nn.Module):
    """DeepSpeed's layer with our layer's weights."""

    def __init__(self, ours: MoE) -> None:
        from deepspeed.moe.layer import MoE as Layer

        super().__init__()
        mlp = nn.Sequential(
            nn.Linear(_DIM, _HIDDEN_DIM, bias=False), nn.GELU(), nn.Linear(_HIDDEN_DIM, _DIM, bias=False)
        )
        self.layer = Layer(
            _DIM,
            mlp,
            _EXPERTS,
            ep_size=NUM_RANKS,
            k=ours.top_k,
            capacity_factor=CAPACITY_FACTOR,
            min_capacity=DEEPSPEED_MIN_CAPACITY,
            # It would draw second choices at random; all systems of the comparison choose the best two.
            top2_2nd_expert_sampling=False,
        )
        weights = ours.experts.expert_parameters()
        num_local = _EXPERTS // NUM_RANKS
        with torch.no_grad():
            self.layer.deepspeed_moe.gate.wg.weight.copy_(ours.router.weight)
            for local, expert in enumerate(self.layer.deepspeed_moe.experts.deepspeed_experts):
                number = dist.get_rank() * num_local + local
                expert[0].weight.copy_(weights["up_proj"][number])
                expert[2].weight.copy_(weights["down_proj"][number])

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD: Tensor = self.layer(x_TD)[0]
        return out_TD


def deepspeed_losses(top_k: int) -> list[float]:
    """Losses of DeepSpeed's layer under DeepSpeed's engine, the mean over ranks. On every rank."""
    warnings.simplefilter("ignore")
    import deepspeed

    rank = dist.get_rank()
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    deepspeed.init_distributed("gloo")
    model = make_model(top_k)
    model.moe = _DeepSpeedMoE(model.moe)
    batch_sizes = {"train_micro_batch_size_per_gpu": _TOKENS, "train_batch_size": NUM_RANKS * _TOKENS}
    # It clips at 1.0 unless told otherwise.
    config = {**batch_sizes, "gradient_clipping": 0.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    losses = []
    for step in range(NUM_STEPS):
        ids, wanted = (part.chunk(NUM_RANKS)[rank] for part in batch(step))
        torch.manual_seed(step * NUM_RANKS + rank)
        loss = F.cross_entropy(engine(ids), wanted)
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / NUM_RANKS
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def main() -> None:
    """Command line."""
    provenance, results = collect_provenance(), {}
    for top_k in TOP_KS:
        theirs = run_ranks(deepspeed_losses, NUM_RANKS, top_k, timeout_s=300)[0]
        ours: dict[str, Any] = emulated(top_k)
        for step, (mine, other, dropped) in enumerate(zip(ours["losses"], theirs, ours["dropped"], strict=True)):
            print(f"top-{top_k}, step {step:2}  DeepSpeed {other:.6f}  emulated {mine:.6f}  dropped {dropped:.1%}")
        results[f"top-{top_k}"] = {"deepspeed_losses": theirs, **ours}
    write_result("deepspeed_layer", provenance, results)


if __name__ == "__main__":
    main()
