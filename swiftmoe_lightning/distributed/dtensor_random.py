"""Random values for sharded parameters: `nn.init.normal_(p)`, `p.add_(torch.randn_like(p))`."""

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
    """Let random values of a DTensor on the CPU be this rank's shard of those that one process would draw.

    On the CPU, torch draws each rank's shard by itself: with one seed on all ranks, every rank gets the same values,
    and experts the same rows W times. (On GPUs torch avoids this.) Meanwhile every rank allocates the whole tensor.
    """
    handle(_draw, *_FILL, *_LIKE, _aten.bernoulli.default)


def _draw(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, *settings = args
    if tensor.device.type != "cpu":
        return by_default(operator, args, kwargs)
    # The values of bernoulli's input are its probabilities.
    full: Tensor = tensor.full_tensor() if operator is _aten.bernoulli.default else _empty_full(tensor)
    drawn = distribute_tensor(
        operator(full, *settings, **kwargs), tensor.device_mesh, tensor.placements, src_data_rank=None
    )
    return tensor.copy_(drawn) if operator in _FILL else drawn


def _empty_full(tensor: DTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
