"""Makes the engine's `ExpertGroup` from its settings."""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.distributed import ExpertGroup

_NO_PROCESS_GROUP: Final = (
    "offload_optimizer and reshard_after_forward send weights through a process group, also on one device, and there "
    "is none. Start the script with torchrun (--nproc-per-node 1 for one device) and call "
    "torch.distributed.init_process_group before the engine, as Lightning and Accelerate do under torchrun; or, in a "
    'plain process, init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1), on a GPU '
    "for 'cpu:gloo,cuda:nccl'. (FAQ: no-process-group)"
)


def make_group(
    config: SwiftMoEConfig,
    device: torch.device,
    ranks_per_node: int | None,
    mesh: DeviceMesh | None,
    tensor_mesh: DeviceMesh | None,
) -> ExpertGroup | None:
    """This rank's expert group. A collective at the first call.

    Args:
        config: the engine's.
        device: of the slots.
        ranks_per_node: neighbouring ranks that share a node; None takes the launcher's.
        mesh: of the user; its last axis is the expert group.
        tensor_mesh: of the user; ranks along its last axis have the same tokens.

    Returns:
        None without a process group, or on one rank, unless the config spreads one rank.

    Raises:
        ValueError: when groups do not fit the ranks.
        RuntimeError: for a config that needs a process group where there is none.
    """
    num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
    if config.spreads_one_rank and num_ranks == 0:
        raise RuntimeError(_NO_PROCESS_GROUP)
    if num_ranks <= 1 and not config.spreads_one_rank:
        return None
    size = config.resolve_expert_parallel_size(num_ranks)
    if mesh is not None and config.expert_parallel_size not in (None, mesh.size(-1)):
        raise ValueError(
            f"expert_parallel_size={size}, and the last axis of the mesh has {mesh.size(-1)} ranks: {mesh}. Leave "
            "one of them out."
        )
    group = ExpertGroup(
        device.type,
        size,
        ranks_per_node,
        mesh,
        tensor_mesh,
        shard_device_type="cpu" if config.offload_optimizer else device.type,
        exchange=config.exchange,
    )
    if config.dense == "ddp" and group.tensor is not None and group.num_data_ranks > 1:
        raise ValueError(
            f"dense='ddp' cannot average tensor-parallel parameters over the other axes of {tensor_mesh}. Set "
            "dense='fsdp2', which cuts the dense part over them."
        )
    return group


def device_of_module(module: nn.Module) -> torch.device:
    """Where its parameters are; the CPU for a module on meta."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
