"""DeepSpeed's MoE layer under DeepSpeed's engine, on routes that it is given.

Its gate reads its weight and not `wg.forward`, so the routes go to the function that makes them of scores: scores of
experts that were not drawn become minus infinity. What it then counted is compared with what was drawn. T tokens, D
model dim, E experts, K top-k.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import swiftmoe_lightning as sml
from benchmarks.step.training import TrainingSystem
from benchmarks.step.workload import Model, Workload, optimizer_of

_GATINGS = {1: "top1gating", 2: "top2gating"}


class _Expert(nn.Module):
    """One gated expert. Args: as the rows of our layer's parameters, gate_up [2F, D] and down [D, F]."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up.detach().clone()), nn.Parameter(down.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, self.gate_up).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down)


class DeepSpeedMoE(nn.Module):
    """DeepSpeed's layer with our layer's weights, routes and activation: [..., D] -> [..., D].

    Args:
        ours: the layer.
        capacity_factor: None drops nothing.
    """

    def __init__(self, ours: sml.MoE, capacity_factor: float | None) -> None:
        from deepspeed.moe import sharded_moe
        from deepspeed.moe.layer import MoE as Layer

        super().__init__()
        weights, num_experts = ours.experts.expert_parameters(), ours.experts.num_experts
        gate_up_E, down_E = weights["gate_up_proj"], weights["down_proj"]
        self.layer = Layer(
            ours.dim,
            _Expert(gate_up_E[0], down_E[0]),
            num_experts,
            ep_size=dist.get_world_size(),
            k=ours.top_k,
            capacity_factor=capacity_factor or 1.0,
            drop_tokens=capacity_factor is not None,
            # It would draw second choices at random.
            top2_2nd_expert_sampling=False,
        )
        self._routes, self._sharded_moe = ours.router.routes, sharded_moe
        self._gating = _GATINGS.get(ours.top_k, "topkgating")
        self._drawn_TK = torch.empty(0, 0, dtype=torch.int64)
        moe = self.layer.deepspeed_moe
        with torch.no_grad():
            moe.gate.wg.weight.copy_(ours.router.weight)
            first = dist.get_rank() * self.layer.num_local_experts
            for local, expert in enumerate(moe.experts.deepspeed_experts):
                expert.gate_up.copy_(gate_up_E[first + local])
                expert.down.copy_(down_E[first + local])

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        self._drawn_TK = self._routes.draw(x.flatten(0, -2).shape[0])
        original = getattr(self._sharded_moe, self._gating)

        def on_drawn(logits_TE: Tensor, *rest: Any, **options: Any) -> Any:
            others_TE = torch.ones_like(logits_TE, dtype=torch.bool).scatter_(1, self._drawn_TK, False)
            return original(logits_TE.masked_fill(others_TE, float("-inf")), *rest, **options)

        with patch.object(self._sharded_moe, self._gating, on_drawn):
            out: Tensor = self.layer(x)[0]
        return out

    def check_routing(self) -> None:
        """Compare how many tokens of this rank DeepSpeed counted for each expert with how many were drawn.

        Raises:
            AssertionError: where they differ.
        """
        counted_E = self.layer.deepspeed_moe.exp_counts.tolist()
        drawn_E = self._drawn_TK.flatten().bincount(minlength=len(counted_E)).tolist()
        assert counted_E == drawn_E, f"DeepSpeed routed {counted_E} tokens to the experts, and {drawn_E} were drawn"


def deepspeed(workload: Workload, capacity_factor: float | None) -> TrainingSystem:
    """The workload under DeepSpeed, experts over all ranks, no ZeRO. A collective.

    Args:
        workload: what is trained.
        capacity_factor: of each rank's tokens for each expert; None drops nothing.
    """
    warnings.simplefilter("ignore")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed as library

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    library.init_distributed("gloo")
    model, num_ranks = Model(workload), dist.get_world_size()
    layers = []
    for block in model.blocks:
        block.moe = DeepSpeedMoE(block.moe, capacity_factor)
        layers.append(block.moe)
    num_sequences = len(model.batch_BT)
    batch_sizes = {
        "train_micro_batch_size_per_gpu": num_sequences,
        "train_batch_size": num_ranks * num_sequences,
    }
    # It clips at 1.0 unless told otherwise.
    config = {**batch_sizes, "gradient_clipping": 0.0}
    optimizer = optimizer_of(model.parameters())
    engine, *_ = library.initialize(model=model, optimizer=optimizer, config=config)

    def check_routing() -> None:
        for layer in layers:
            layer.check_routing()

    return TrainingSystem(
        model=engine,
        optimizer=optimizer,
        source=model,
        backward=engine.backward,
        update=engine.step,
        check_routing=check_routing,
    )
