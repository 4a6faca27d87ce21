"""The models and policies that ranks run in these tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.placement import Forecast
from tests.engine import dense


class RandomPolicy(sml.PlacementPolicy):
    """Another valid placement for every popularity: seeded by it, so that all ranks draw the same."""

    def place(self, forecast: Forecast) -> list[sml.Placement]:
        popularity_LE = forecast.popularity_LE
        rng = np.random.default_rng(popularity_LE.astype(np.uint64).flatten())
        num_experts = popularity_LE.shape[1]
        spare = self.num_slots - num_experts
        rows = [np.r_[np.arange(num_experts), rng.integers(num_experts, size=spare)] for _ in popularity_LE]
        return self.placements_of([rng.permutation(row) for row in rows], num_experts)


class Residual(nn.Module):
    """x + moe(x), then tanh if asked."""

    def __init__(self, moe: sml.MoE, tanh: bool) -> None:
        super().__init__()
        self.router, self.experts = moe.router, moe.experts
        self.moe, self.tanh = [moe], tanh

    def forward(self, x_TD: Tensor) -> Tensor:
        out = x_TD + self.moe[0](x_TD)
        return torch.tanh(out) if self.tanh else out


def build(dtype: torch.dtype = torch.float32, **options: object) -> nn.Sequential:
    """The model of `dense.dense_forward`, from the package's modules."""
    torch.manual_seed(0)
    first = sml.MoE(dense.DIM, dense.HIDDEN, dense.NUM_EXPERTS, dense.TOP_K, **options)
    second = sml.MoE(dense.DIM, 9, 3, 1, activation="gelu", bias=True, **options)
    layers = [nn.Linear(dense.DIM, dense.DIM), Residual(first, True), Residual(second, False), nn.Linear(dense.DIM, 3)]
    return nn.Sequential(*layers).to(dtype)


def my_part(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's rows of a global batch."""
    return tensor[rank * len(tensor) // world_size : (rank + 1) * len(tensor) // world_size]
