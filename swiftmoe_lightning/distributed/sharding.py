"""Sharded parameters: an expert tensor [E, rows, ...] cut by rows over the ranks, as a DTensor with `Shard(1)`.

With several expert groups the rows are cut over the ranks of a group, and each part over the groups: `Shard(1)` on both
axes. The functions also take FSDP2's parameters, which are cut along their first dim, unless they say rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from swiftmoe_lightning.distributed.expert_group import ExpertGroup
from swiftmoe_lightning.placement import shard_rows


def shard_from_rank_zero(full: Tensor, group: ExpertGroup) -> DTensor:
    """Rank 0's `full` tensor, cut by rows; the other ranks' values are ignored, as in DDP. A collective."""
    return distribute_tensor(full.detach(), group.shard_mesh, _by_rows(group.shard_mesh), src_data_rank=0)


def sharded_from_local(local: Tensor, shape: torch.Size, group: ExpertGroup) -> DTensor:
    """The sharded parameter of global `shape` of which `local` is this rank's shard. No communication."""
    return _from_local(local, shape, group.shard_mesh, _by_rows(group.shard_mesh))


def sharded_like(local: Tensor, sharded: Tensor) -> DTensor:
    """A DTensor of the shape and cut of `sharded`, of which `local` is this rank's shard. No communication."""
    assert isinstance(sharded, DTensor)
    return _from_local(local, sharded.shape, sharded.device_mesh, sharded.placements)


def shard_of(full: Tensor, sharded: Tensor) -> Tensor:
    """This rank's shard of `full` if it were cut as the DTensor `sharded` is; shares its storage."""
    assert isinstance(sharded, DTensor)
    for dim, (first, last) in shard_ranges(sharded).items():
        full = full.narrow(dim, first, last - first)
    return full


def shard_ranges(sharded: DTensor) -> dict[int, tuple[int, int]]:
    """Dim -> first and last-plus-one index of this rank's shard, for each dim that is cut."""
    return _ranges_of(sharded.shape, sharded.device_mesh, sharded.placements)


def _ranges_of(shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> dict[int, tuple[int, int]]:
    ranges: dict[int, tuple[int, int]] = {}
    # Of a dim that tensor parallelism has cut, FSDP2 cuts each part, though its axis comes first: a _StridedShard.
    is_strided = [not placement.is_replicate() and type(placement) is not Shard for placement in placements]
    for axis in sorted(range(len(placements)), key=is_strided.__getitem__):
        placement: Any = placements[axis]
        if placement.is_replicate():
            continue
        assert type(placement) is Shard or placement.split_factor, placement
        first, last = ranges.get(placement.dim, (0, shape[placement.dim]))
        part = shard_rows(last - first, mesh.size(axis))[mesh.get_local_rank(axis)]
        ranges[placement.dim] = (first + part[0], first + part[1])
    return ranges


def shard_whole_values(parameters: Mapping[str, Tensor], state: dict[str, Any], prefix: str) -> None:
    """Prepare `state` for `load_state_dict`: whole tensors of sharded parameters become DTensors of them.

    No communication.

    Args:
        parameters: by name. Values of plain ones, or of another shape, stay as they are.
        state: changed in place.
        prefix: of the parameters' names in `state`.
    """
    for name, parameter in parameters.items():
        value = state.get(prefix + name)
        if not isinstance(value, Tensor) or is_sharded(value) or value.shape != parameter.shape:
            continue
        if is_sharded(parameter):
            state[prefix + name] = sharded_like(shard_of(value, parameter).to(parameter.device), parameter)


def _from_local(local: Tensor, shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def local_rows(shape: torch.Size, group: ExpertGroup) -> tuple[int, int]:
    """First and last-plus-one row that this rank owns of an expert tensor of global `shape` [E, rows, ...]."""
    return _ranges_of(shape, group.shard_mesh, _by_rows(group.shard_mesh))[1]


def _by_rows(mesh: DeviceMesh) -> list[Shard]:
    return [Shard(1)] * mesh.ndim


def first_row(value: Tensor) -> int:
    """The first row of this rank's shard of a sharded parameter; 0 for any other tensor."""
    return shard_ranges(value)[1][0] if isinstance(value, DTensor) else 0


def local_shard(value: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its storage; any other tensor as it is."""
    if not isinstance(value, DTensor):
        return value
    # Not `value.detach()`, which goes through DTensor's slow dispatch.
    with torch.no_grad():
        return value.to_local()


def gradient_shard(parameter: Tensor) -> Tensor:
    """This rank's shard of a sharded parameter's gradient, cut as the parameter is.

    A collective if it is not yet: under tensor parallelism autograd may leave another cut, or parts to be summed.
    """
    gradient = parameter.grad
    assert isinstance(parameter, DTensor)
    assert isinstance(gradient, DTensor)
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_shard(gradient)


def write_counts(value: Tensor) -> tuple[int, int]:
    """Counts of writes to a DTensor and to its shard: a write to one does not count on the other."""
    return value._version, local_shard(value)._version


def full_tensor(value: Tensor) -> Tensor:
    """A DTensor gathered whole on every rank (a collective); any other tensor as it is."""
    if not isinstance(value, DTensor):
        return value
    full: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def is_cut_over(value: Tensor, group: ExpertGroup) -> bool:
    """Whether it is a sharded parameter of these ranks."""
    if not isinstance(value, DTensor):
        return False
    return value.device_mesh == group.shard_mesh and list(value.placements) == _by_rows(group.shard_mesh)


def is_on(value: Tensor, mesh: DeviceMesh) -> bool:
    """Whether it is a DTensor on an axis of this mesh, by the axes' names."""
    names = value.device_mesh.mesh_dim_names if isinstance(value, DTensor) else None
    return not set(names or ()).isdisjoint(mesh.mesh_dim_names or ())


def is_first_copy(value: Tensor) -> bool:
    """Whether this rank's shard of a DTensor counts: of ranks that have the same one, the first's does."""
    if not isinstance(value, DTensor):
        return True
    mesh, axes = value.device_mesh, enumerate(value.placements)
    # A mesh of some ranks, as for tensor parallelism, has twins with copies. The one with rank 0 counts.
    is_first_mesh = mesh.size() == dist.get_world_size() or bool((mesh.mesh == 0).any())
    return is_first_mesh and all(mesh.get_local_rank(axis) == 0 for axis, p in axes if p.is_replicate())


def is_sharded(value: object) -> bool:
    """Whether `value` is a tensor cut over the ranks."""
    return isinstance(value, DTensor)
