"""Refuses inputs that `Experts` cannot take. T tokens, D model dim, E experts, K top-k."""

from __future__ import annotations

import torch
from torch import Tensor


def check_input(x_TD: Tensor, expert_ids_TK: Tensor, num_experts: int, dim: int) -> None:
    """Check what is known without a look at the values.

    Args:
        x_TD: must be [T, D].
        expert_ids_TK: must be integers.
        num_experts: E.
        dim: D.

    Raises:
        TypeError: for ids that are no integers.
        ValueError: for tokens of another shape.
    """
    if expert_ids_TK.is_floating_point() or expert_ids_TK.dtype == torch.bool:
        raise TypeError(
            f"Experts take expert ids as integers of 0..{num_experts - 1} (-1 and {num_experts} are unassigned), got "
            f"{expert_ids_TK.dtype}. Pass the indices of topk, not its values or a mask."
        )
    if x_TD.dim() != 2 or x_TD.shape[-1] != dim:
        raise ValueError(
            f"Experts take [tokens, dim={dim}], got {list(x_TD.shape)}. Flatten all but the last dim, or build the "
            f"layer with dim={x_TD.shape[-1]}."
        )


def check_ids(expert_ids_TK: Tensor, num_experts: int) -> None:
    """Check the values of ids, on the CPU. Only a debugging run waits for a GPU to do so.

    Args:
        expert_ids_TK: [T, K] int.
        num_experts: E.

    Raises:
        ValueError: for ids outside -1..E.
    """
    if not expert_ids_TK.numel() or not _may_wait_for(expert_ids_TK.device):
        return
    least, most = (int(end) for end in expert_ids_TK.aminmax())
    if least < -1 or most > num_experts:
        raise ValueError(
            f"expert ids must be 0..{num_experts - 1} (-1 and {num_experts} are unassigned), got {least}..{most}. "
            "Build the layer with the router's num_experts."
        )


def _may_wait_for(device: torch.device) -> bool:
    return device.type == "cpu" or torch.is_anomaly_enabled()
