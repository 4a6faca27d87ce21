"""Replaces the parameters of `Experts` by sharded ones. E experts."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from swiftmoe_lightning.distributed import (
    ExpertGroup,
    full_tensor,
    is_cut_over,
    is_sharded,
    local_rows,
    local_shard,
    shard_from_rank_zero,
    sharded_from_local,
)
from swiftmoe_lightning.modules import Experts


@torch.no_grad()
def shard_parameters(
    experts: Experts, group: ExpertGroup, device: torch.device, pins: bool = False
) -> dict[str, nn.Parameter]:
    """Shard the module's parameters, in place; those that are sharded already stay as they are. A collective.

    Rank 0's values are used, as in DDP. Meta parameters are never allocated whole: each rank draws its own rows, with
    the values that `reset_parameters` would have given them. DTensors that are cut in another way are gathered, one
    after the other, and cut anew.

    Args:
        experts: its parameters are replaced.
        group: the ranks that get the rows.
        device: of this rank's rows; those that a `module.to()` has moved come back.
        pins: keep them in the CPU's pinned memory, from which a GPU copies them by itself.

    Returns:
        Name -> the parameter that was replaced.
    """
    parameters = experts.expert_parameters()
    replaced = {name: p for name, p in parameters.items() if not (is_cut_over(p, group) and _is_on(p, device))}
    seed = group.broadcast_int(int(torch.randint(2**31, ()).item()), device) if experts.is_meta else 0
    for name, parameter in replaced.items():
        if parameter.is_meta:
            first, last = local_rows(parameter.shape, group)
            shape = (parameter.shape[0], last - first, *parameter.shape[2:])
            local = torch.empty(shape, dtype=parameter.dtype, device=device)
            experts.initialize_rows(name, local, first, seed)
            sharded = sharded_from_local(local, parameter.shape, group)
        elif is_cut_over(parameter, group):
            sharded = sharded_from_local(local_shard(parameter).to(device), parameter.shape, group)
        elif is_sharded(parameter):
            first, last = local_rows(parameter.shape, group)
            local = full_tensor(parameter)[:, first:last].to(device, copy=True)
            sharded = sharded_from_local(local, parameter.shape, group)
        else:
            sharded = shard_from_rank_zero(parameter.to(device), group)
        if pins:
            sharded = sharded_from_local(local_shard(sharded).pin_memory(), parameter.shape, group)
        new_parameter = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            setattr(new_parameter, kind, getattr(parameter, kind, None))
        experts.register_parameter(name, new_parameter)
    return replaced


def _is_on(sharded: nn.Parameter, device: torch.device) -> bool:
    # An index may be left out: "cuda" is the current one.
    return local_shard(sharded).device.type == device.type


def refuse_fully_sharded(module: nn.Module, group: ExpertGroup) -> None:
    """Refuse a module in which `fully_shard` has cut experts.

    Raises:
        ValueError: naming them.
    """
    cut = {p for part in module.modules() if isinstance(part, Experts) for p in part.expert_parameters().values()}
    cut = {p for p in cut if is_sharded(p) and not is_cut_over(p, group)}
    if not cut:
        return
    for name, part in reversed([*module.named_modules()]):
        if cut.intersection(part.parameters()) and isinstance(part, FSDPModule):
            raise ValueError(
                f"fully_shard has cut the experts in {name or type(module).__name__!r}, and gathers them whole in "
                "every forward. Make the engine first, with dense='fsdp2', which cuts the rest; or pass the "
                "parameters of all Experts to fully_shard as ignored_params."
            )
