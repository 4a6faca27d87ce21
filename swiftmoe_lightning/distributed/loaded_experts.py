"""Expert tensors while a checkpoint is read: cut by experts, as readers of checkpoints can; afterwards cut by rows.

E experts, g ranks of an expert group.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from swiftmoe_lightning.distributed.expert_group import ExpertGroup
from swiftmoe_lightning.distributed.sharding import local_rows, sharded_from_local
from swiftmoe_lightning.placement import shard_rows


def cut_by_experts(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A meta DTensor of the global shape of `tensor` [E, rows, ...], of which each rank gets the values of E/g experts.

    Where some ranks would get none, all get all of them: readers cannot stack the experts of a file into nothing.

    Args:
        tensor: on meta; a DTensor counts by its global shape.
        mesh: one axis, the ranks of an expert group.
    """
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    first, last = shard_rows(len(whole), mesh.size())[-1]
    placement = Shard(0) if first < last else Replicate()
    return distribute_tensor(whole, mesh, [placement], src_data_rank=None).requires_grad_(tensor.requires_grad)


def cut_by_rows(loaded: Tensor, group: ExpertGroup) -> DTensor:
    """The sharded parameter with the values of a `cut_by_experts` that has been read. A collective of an expert group.

    Args:
        loaded: [E, rows, ...], the same values in every group.
        group: the ranks of its mesh, and those of the other groups.
    """
    assert isinstance(loaded, DTensor)
    # On CPUs torch gathers all experts for it, once a load, and would warn each rank of that.
    logging.getLogger("torch.distributed.tensor._collective_utils").addFilter(_is_news)
    in_group = loaded.redistribute(placements=[Shard(1)]).to_local().detach()
    first, last = local_rows(loaded.shape, group)
    offset = group.expert.own_rows(loaded.shape[1]).start
    own = in_group[:, first - offset : last - offset].clone(memory_format=torch.contiguous_format)
    return sharded_from_local(own.to(group.shard_mesh.device_type), loaded.shape, group)


def _is_news(record: logging.LogRecord) -> bool:
    return "does not support alltoall" not in record.getMessage()
