"""FlexMoE on real ranks: its placements under our engine, and as many bytes moved as its optimizer state has."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partialmethod
from typing import Final

import torch
import torch.distributed as dist
from torch import nn

from swiftmoe_lightning import Placement
from swiftmoe_lightning.analysis.baselines import FlexMoEPolicy

# What AdamW keeps of a parameter beside the parameter itself, in parameters.
_STATE_COPIES: Final = 2


def flexmoe_policy(interval: int) -> type[FlexMoEPolicy]:
    """FlexMoE's policy with this many steps between two revisions, as `SwiftMoEConfig.placement` takes it."""
    return type("FlexMoE", (FlexMoEPolicy,), {"__init__": partialmethod(FlexMoEPolicy.__init__, interval=interval)})


def move_state(model: nn.Module, before: Mapping[str, Placement], after: Mapping[str, Placement]) -> int:
    """Send as many bytes as the optimizer state of the experts that have moved: systems whose state lives beside the
    weights must, and ours never does. Every rank sends and gets its part. A collective.

    Args:
        model: has the experts modules.
        before: name of an experts module -> its placement in the step that ends.
        after: the same of the next step.

    Returns:
        Bytes that this rank has sent to other ranks.
    """
    experts = {name: module for name, module in model.named_modules() if name in after}
    bytes_sent = 0
    for name, placement in after.items():
        moved = before[name].num_moved(placement)
        if moved:
            size = sum(p.numel() for p in experts[name].parameters()) // placement.num_experts
            world_size = placement.world_size
            part = -(-moved * size * _STATE_COPIES // world_size**2) * world_size
            received = torch.empty(part)
            dist.all_to_all_single(received, torch.zeros(part))
            bytes_sent += received.nbytes * (world_size - 1) // world_size
    return bytes_sent
