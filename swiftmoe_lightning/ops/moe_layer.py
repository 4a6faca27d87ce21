"""The expert layer from tokens to tokens: fused kernels where they fit, the operations one by one elsewhere.

T tokens, D model dim, K top-k, R rows (surviving choices, sorted by slot), s slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from swiftmoe_lightning.ops import backend
from swiftmoe_lightning.ops.fused import fused_expert_mlp, fused_moe
from swiftmoe_lightning.ops.grouped import expert_mlp
from swiftmoe_lightning.ops.operators import combine, permute
from swiftmoe_lightning.ops.reference import Activation


def expert_rows(
    x_TD: Tensor,
    choice_R: Tensor,
    rows_TK: Tensor,
    ends_s: Tensor,
    weights: Mapping[str, Tensor],
    activation: Activation,
) -> Tensor:
    """[T, D] -> [R, D]: each row's token through its slot's expert.

    Args:
        x_TD: [T, D] floating.
        choice_R: [R] int, the choice t * K + k in each row.
        rows_TK: [T, K] int, its inverse, -1 where a choice has no row.
        ends_s: [s] int32, the end of each slot's rows. Rows behind the last end are unassigned.
        weights: as `expert_mlp` takes them.
        activation: one of `ACTIVATIONS`, or a function of rows.

    Raises:
        ValueError: for an activation that is neither.
    """
    if isinstance(activation, str) and _fuses(x_TD, weights, len(choice_R), rows_TK.shape[1]):
        return fused_expert_mlp(x_TD, choice_R, rows_TK, ends_s, weights, activation)
    choice_R = _assigned(choice_R, ends_s)
    return expert_mlp(permute(x_TD, choice_R, rows_TK), weights, ends_s, activation)


def expert_layer(
    x_TD: Tensor,
    weights_TK: Tensor,
    choice_R: Tensor,
    rows_TK: Tensor,
    ends_s: Tensor,
    weights: Mapping[str, Tensor],
    activation: Activation,
) -> Tensor:
    """[T, D] -> [T, D]: `expert_rows`, then each token's rows summed by router weight.

    Args:
        x_TD: [T, D] floating.
        weights_TK: [T, K] floating, the router's.
        choice_R: [R] int, as in `expert_rows`.
        rows_TK: [T, K] int, as in `expert_rows`.
        ends_s: [s] int32, as in `expert_rows`.
        weights: as `expert_mlp` takes them.
        activation: one of `ACTIVATIONS`, or a function of rows.

    Raises:
        ValueError: for an activation that is neither.
    """
    if isinstance(activation, str) and _fuses(x_TD, weights, len(choice_R), rows_TK.shape[1]):
        return fused_moe(x_TD, weights_TK, choice_R, rows_TK, ends_s, weights, activation)
    choice_R = _assigned(choice_R, ends_s)
    y_RD = expert_mlp(permute(x_TD, choice_R, rows_TK), weights, ends_s, activation)
    return combine(y_RD, weights_TK, choice_R, rows_TK)


def _fuses(x_TD: Tensor, weights: Mapping[str, Tensor], num_rows: int, top_k: int) -> bool:
    num_slots, _, hidden_dim = weights["down_proj"].shape
    path = backend.choose_layer(x_TD.device, x_TD.dtype, num_rows // num_slots, hidden_dim, top_k)
    # The kernels read [s, out, in]; a transposed view would be copied in every call.
    return path.name == "triton" and all(w.is_contiguous() and w.dtype == x_TD.dtype for w in weights.values())


def _assigned(choice_R: Tensor, ends_s: Tensor) -> Tensor:
    """Without the rows that are unassigned, where to know their number costs nothing."""
    if choice_R.device.type != "cpu" or torch.compiler.is_compiling() or not len(ends_s):
        return choice_R
    return choice_R[: int(ends_s[-1])]
