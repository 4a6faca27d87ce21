"""Random values for tensors cut over the ranks: `nn.init.normal_(p)`, `p.add_(torch.randn_like(p))`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from swiftmoe_lightning.distributed.dtensor_handlers import by_default, handle

_aten = torch.ops.aten
_FILL = (
    _aten.uniform_.default,
    _aten.normal_.default,
    _aten.bernoulli_.float,
    _aten.exponential_.default,
    _aten.cauchy_.default,
    _aten.log_normal_.default,
    _aten.geometric_.default,
    _aten.random_.default,
    _aten.random_.to,
    getattr(_aten.random_, "from"),
)
_LIKE = (_aten.rand_like.default, _aten.randn_like.default, _aten.randint_like.default, _aten.randint_like.low_dtype)


def handle_random() -> None:
    """Let a draw for a DTensor on the CPU be this rank's part of what one process would draw.

    There, torch lets each rank draw as many values as it holds: with one seed on all ranks they are the same on each,
    and experts get the same rows W times. (On GPUs torch itself sees to it.) For a moment the whole tensor stands here.
    """
    handle(_draw, *_FILL, *_LIKE, _aten.bernoulli.default)


def _draw(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    like, *settings = args
    if like.device.type != "cpu":
        return by_default(operator, args, kwargs)
    # What a bernoulli draws depends on its values.
    whole: Tensor = like.full_tensor() if operator is _aten.bernoulli.default else _empty(like)
    drawn = distribute_tensor(
        operator(whole, *settings, **kwargs), like.device_mesh, like.placements, src_data_rank=None
    )
    return like.copy_(drawn) if operator in _FILL else drawn


def _empty(like: DTensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
