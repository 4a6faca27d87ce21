"""The expert layer from tokens to tokens: fused kernels where they fit, the operations one by one elsewhere.

T tokens, D model dim, K top-k, R rows (assignments that are computed here, sorted by slot), s slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from swiftmoe_lightning.ops.activation import Activation
from swiftmoe_lightning.ops.backend import choose_layer_backend
from swiftmoe_lightning.ops.fused import fused_expert_layer, fused_expert_rows
from swiftmoe_lightning.ops.grouped import expert_mlp, is_factor
from swiftmoe_lightning.ops.permute import combine, permute
from swiftmoe_lightning.ops.sort import SortedAssignments


def expert_rows(
    x_TD: Tensor, assignments: SortedAssignments, weights: Mapping[str, Tensor], activation: Activation
) -> Tensor:
    """[T, D] -> [R, D]: each row's token through its slot's expert.

    Args:
        x_TD: [T, D] floating.
        assignments: sorted by slot. The result of an unassigned row is undefined; on the CPU such rows are left out.
        weights: as `expert_mlp` takes them.
        activation: one of `ACTIVATIONS`, or a function of rows.

    Raises:
        ValueError: for an activation that is neither.
    """
    if isinstance(activation, str) and _fuses(x_TD, assignments, weights):
        return fused_expert_rows(x_TD, assignments, weights, activation)
    assignments = _only_assigned(assignments)
    return expert_mlp(permute(x_TD, assignments), weights, assignments.ends_G, activation)


def expert_layer(
    x_TD: Tensor,
    weights_TK: Tensor,
    assignments: SortedAssignments,
    weights: Mapping[str, Tensor],
    activation: Activation,
) -> Tensor:
    """[T, D] -> [T, D]: `expert_rows`, then each token's sum of its rows, weighted by the router.

    Args:
        x_TD: [T, D] floating.
        weights_TK: [T, K] floating, the router's.
        assignments: sorted by slot.
        weights: as `expert_mlp` takes them.
        activation: one of `ACTIVATIONS`, or a function of rows.

    Raises:
        ValueError: for an activation that is neither.
    """
    if isinstance(activation, str) and _fuses(x_TD, assignments, weights):
        return fused_expert_layer(x_TD, weights_TK, assignments, weights, activation)
    assignments = _only_assigned(assignments)
    y_RD = expert_mlp(permute(x_TD, assignments), weights, assignments.ends_G, activation)
    return combine(y_RD, weights_TK, assignments)


def _fuses(x_TD: Tensor, assignments: SortedAssignments, weights: Mapping[str, Tensor]) -> bool:
    if any(map(is_factor, weights)):
        # The kernels know no adapters.
        return False
    num_slots, _, hidden_dim = weights["down_proj"].shape
    rows_per_slot, top_k = len(assignments.assignment_R) // num_slots, assignments.rows_TK.shape[1]
    backend = choose_layer_backend(x_TD.device, x_TD.dtype, rows_per_slot, hidden_dim, top_k)
    # The kernels read [s, out, in]; a transposed view would be copied in every call.
    return backend.name == "triton" and all(w.is_contiguous() and w.dtype == x_TD.dtype for w in weights.values())


def _only_assigned(assignments: SortedAssignments) -> SortedAssignments:
    """Drop unassigned rows, on the CPU only: on a GPU, reading their number would wait for it."""
    assignment_R, _, _, ends_G = assignments
    if assignment_R.device.type != "cpu" or torch.compiler.is_compiling() or not len(ends_G):
        return assignments
    return assignments._replace(assignment_R=assignment_R[: int(ends_G[-1])])
