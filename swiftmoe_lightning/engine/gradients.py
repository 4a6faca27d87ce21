"""Clipping and loss scaling over parameters of which some are cut over the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from swiftmoe_lightning.comms import ExpertGroup, is_master, local_shard
from swiftmoe_lightning.engine.update import ShardedUpdate


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    group: ExpertGroup | None,
    norm_type: float = 2.0,
) -> Tensor:
    """Scale all gradients so that their total norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    Dense gradients are equal on all ranks and count once; of a master's gradient each rank counts its rows. A
    collective when there are masters. Returns [] the norm before clipping, equal on all ranks.
    """
    dense, shards = _split_gradients(parameters)
    norm_type = float(norm_type)
    total = get_total_norm(dense + shards, norm_type) if group is None else torch.zeros(())
    if group is not None:
        dense_norm, shard_norm = (get_total_norm(grads, norm_type) for grads in (dense, shards))
        device = next((g.device for g in dense + shards), torch.device("cpu"))
        dense_norm, shard_norm = dense_norm.to(device), shard_norm.to(device)
        if norm_type == float("inf"):
            total = torch.maximum(dense_norm, group.all_reduce(shard_norm, dist.ReduceOp.MAX))
        else:
            total = (dense_norm**norm_type + group.all_reduce(shard_norm**norm_type)) ** (1.0 / norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in dense + shards:
        gradient.mul_(factor.to(gradient.device, gradient.dtype))
    return total


@torch.no_grad()
def clip_grad_value(parameters: Iterable[nn.Parameter], clip_value: float) -> None:
    """Clamp every gradient's elements to +-clip_value. No communication."""
    dense, shards = _split_gradients(parameters)
    for gradient in dense + shards:
        gradient.clamp_(-clip_value, clip_value)


def _split_gradients(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    dense: list[Tensor] = []
    shards: list[Tensor] = []
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is not None:
            (shards if is_master(parameter.grad) else dense).append(local_shard(parameter.grad))
    return dense, shards


class ShardedGradScaler(torch.amp.GradScaler):
    """A GradScaler that looks at local shards, and whose ranks agree: an inf on one rank skips the step on all.

    Make it with `engine.grad_scaler(...)`.
    """

    def __init__(self, group: ExpertGroup, updates: dict[int, ShardedUpdate], device: str, **options: Any) -> None:
        super().__init__(device, **options)
        self._group, self._updates = group, updates

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        update = self._updates.get(id(optimizer))
        if update is None:
            per_device = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        else:
            with update.on_shards():
                per_device = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        for flag in per_device.values():
            self._group.all_reduce(flag, dist.ReduceOp.MAX)
        return per_device
