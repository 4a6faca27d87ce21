"""Sharded parameters: an expert tensor [E, rows, ...] cut by rows over the ranks, as a DTensor with `Shard(1)`.

FSDP2's parameters, which are cut along their first dimension, are handled alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from swiftmoe_lightning.distributed.group import ExpertGroup
from swiftmoe_lightning.placement import shard_rows


def shard_from_rank_zero(full: Tensor, group: ExpertGroup) -> DTensor:
    """Rank 0's `full` tensor, cut by rows; the other ranks' values are ignored, as in DDP. A collective."""
    return distribute_tensor(full.detach(), group.mesh, [Shard(1)], src_data_rank=0)


def sharded_from_local(local: Tensor, shape: torch.Size, group: ExpertGroup) -> DTensor:
    """This rank's rows (`local`) as a piece of the sharded parameter of global `shape`. No communication."""
    return _from_local(local, shape, group.mesh, [Shard(1)])


def sharded_like(local: Tensor, like: Tensor) -> DTensor:
    """This rank's part of a tensor that has the shape of the DTensor `like` and is cut as it is. No communication."""
    assert isinstance(like, DTensor)
    return _from_local(local, like.shape, like.device_mesh, like.placements)


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that would live here if it were cut as the DTensor `like`, sharing its storage."""
    assert isinstance(like, DTensor)
    (placement,) = like.placements
    assert isinstance(placement, Shard)
    rank = like.device_mesh.get_local_rank()
    first, last = shard_rows(whole.shape[placement.dim], like.device_mesh.size())[rank]
    return whole.narrow(placement.dim, first, last - first)


def shard_whole_values(parameters: Mapping[str, Tensor], state: dict[str, Any], prefix: str) -> None:
    """Let `load_state_dict` take whole tensors for DTensors: in `state`, each becomes this rank's part of it.

    No communication.

    Args:
        parameters: by their name behind `prefix`; plain ones and other shapes are left alone.
        state: changed in place.
        prefix: of the module that holds the parameters, in `state`.
    """
    for name, parameter in parameters.items():
        value = state.get(prefix + name)
        if not isinstance(value, Tensor) or is_sharded(value) or value.shape != parameter.shape:
            continue
        if is_sharded(parameter):
            state[prefix + name] = sharded_like(local_part(value, parameter).to(parameter.device), parameter)


def _from_local(local: Tensor, shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def local_rows(shape: torch.Size, group: ExpertGroup) -> tuple[int, int]:
    """First and last-plus-one row that this rank owns of an expert tensor of global `shape` [E, rows, ...]."""
    return shard_rows(shape[1], group.world_size)[group.rank]


def first_row(value: Tensor) -> int:
    """The row that a sharded parameter's part here begins with; 0 of any other tensor."""
    if not isinstance(value, DTensor):
        return 0
    return shard_rows(value.shape[1], value.device_mesh.size())[value.device_mesh.get_local_rank()][0]


def local_shard(value: Tensor) -> Tensor:
    """The part of a DTensor that lives here, sharing its storage; any other tensor as it is."""
    if not isinstance(value, DTensor):
        return value
    # Not `detach()`, which takes DTensor's slow way round.
    with torch.no_grad():
        return value.to_local()


def full_tensor(value: Tensor) -> Tensor:
    """A DTensor's whole value on every rank (a collective); any other tensor as it is."""
    if not isinstance(value, DTensor):
        return value
    whole: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
    return whole


def is_sharded(value: object) -> bool:
    """Whether `value` is a tensor cut over the ranks."""
    return isinstance(value, DTensor)
