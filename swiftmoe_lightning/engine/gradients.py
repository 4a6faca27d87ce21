"""Gradient clipping and loss scaling where some parameters are sharded."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from swiftmoe_lightning.config import is_number
from swiftmoe_lightning.distributed import ExpertGroup, is_first_copy, is_sharded, local_shard
from swiftmoe_lightning.engine.gradient_placeholder import has_gradient
from swiftmoe_lightning.engine.update import ShardedUpdate


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    group: ExpertGroup | None,
    norm_type: float = 2.0,
) -> Tensor:
    """Scale all gradients so that their total norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    Dense gradients are equal on all ranks and count once; of a sharded parameter's gradient each rank counts its rows.
    A collective when there is a group.

    Args:
        parameters: those without a gradient do not count.
        max_norm: 0 or more; inf limits nothing.
        group: the ranks; None for one rank alone.
        norm_type: the order of the norm; may be inf.

    Returns:
        [] the norm before clipping, equal on all ranks.

    Raises:
        ValueError: for a max_norm below 0, or that is no number.
    """
    _check_limit("max_norm", max_norm)
    parameters = list(parameters)
    total = grad_norm(parameters, group, norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in itertools.chain(*_split_gradients(parameters)):
        local_shard(gradient).mul_(factor.to(gradient.device))
    return total


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter], group: ExpertGroup | None, norm_type: float = 2.0) -> Tensor:
    """The total norm of all gradients. A collective when there is a group.

    Dense gradients are equal on all ranks and count once; of a sharded parameter's gradient each rank counts its rows.

    Args:
        parameters: those without a gradient do not count.
        group: the ranks; None for one rank alone.
        norm_type: the order of the norm; may be inf.

    Returns:
        [] float32 or wider, equal on all ranks.
    """
    dense, sharded = _split_gradients(parameters)
    device = next((g.device for g in dense + sharded), torch.device("cpu"))
    dtype = functools.reduce(torch.promote_types, (g.dtype for g in dense + sharded), torch.float32)
    # torch also takes strings: users of Fabric write "inf".
    norm_type = float(norm_type)
    # Several ranks may have the same shard (dense="hsdp").
    shards = [local_shard(gradient) for gradient in sharded if is_first_copy(gradient)]
    norms = torch.stack([_norm(part, norm_type, device) for part in (dense, shards)])
    if group is not None:
        norms = torch.cat([norms[:1], group.all_gather(norms[1:]).flatten()])
    return torch.linalg.vector_norm(norms, norm_type).to(dtype)


def _norm(tensors: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """[] float64: the total norm; of no tensors, as on a rank without rows, the value that changes no other norm.

    Each is computed in float32 or wider, since squares of float16 numbers overflow in float16.
    """
    norms = [
        torch.linalg.vector_norm(tensor, norm_type, dtype=torch.promote_types(tensor.dtype, torch.float32)).to(device)
        for tensor in tensors
        if tensor.numel()
    ]
    nothing = torch.tensor(0.0 if norm_type >= 0 else float("inf"), dtype=torch.float64, device=device)
    return torch.linalg.vector_norm(torch.stack([nothing, *(n.double() for n in norms)]), norm_type)


@torch.no_grad()
def clip_grad_value(parameters: Iterable[nn.Parameter], clip_value: float) -> None:
    """Clamp every gradient's elements to +-clip_value. No communication.

    Raises:
        ValueError: for a clip_value below 0, or that is no number.
    """
    _check_limit("clip_value", clip_value)
    for gradient in itertools.chain(*_split_gradients(parameters)):
        local_shard(gradient).clamp_(-clip_value, clip_value)


def _check_limit(name: str, value: object) -> None:
    """Raise ValueError for a limit that is no number, or below 0. A limit of inf is allowed, and clips nothing."""
    # The value of a tensor is not read: that would wait for the GPU.
    if not isinstance(value, Tensor) and not (is_number(value) and value >= 0):  # type: ignore[operator]
        raise ValueError(f"{name} must be a number of 0 or more, got {value!r}. Use 1.0, or leave gradients unclipped.")


def _split_gradients(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """(whole gradients, DTensors), without placeholders."""
    dense: list[Tensor] = []
    sharded: list[Tensor] = []
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if has_gradient(parameter):
            assert parameter.grad is not None
            (sharded if is_sharded(parameter.grad) else dense).append(parameter.grad)
    return dense, sharded


class ShardedGradScaler(torch.amp.GradScaler):
    """A GradScaler that checks local shards, and that skips a step on all ranks if one of them has an inf.

    Make it with `engine.grad_scaler(...)`.

    Args:
        group: the ranks that skip together.
        updates: of the optimizers that the engine prepared, by their id.
        device: type of the device, as `torch.amp.GradScaler` takes it.
        **options: anything else that it takes.
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


def settings_of(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """The options that make another scaler like this one."""
    return {
        "init_scale": scaler.get_scale(),
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "enabled": scaler.is_enabled(),
    }
