"""The experts' feed-forward in fused kernels: rows are gathered, activated and weighted inside the products.

T tokens, D model dim, F hidden dim, K top-k, R rows (surviving choices, sorted by slot), s slots, O out features of the
first matrix (2F for swiglu). Saved for backward: the input, Z [R, O] (before the activation) and the routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swiftmoe_lightning.kernels.paths import DTYPES
from swiftmoe_lightning.kernels.reference import ACTIVATIONS

if TYPE_CHECKING:
    from swiftmoe_lightning.kernels.triton.tiles import Rows


def fused_expert_mlp(
    x: Tensor,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    weights: Mapping[str, Tensor],
    activation: str,
) -> Tensor:
    """down(act(up(x))) of each row, with its own slot's matrices.

    x: [T, D]; row r is token choice_R[r] // K. Or [R, D], the rows themselves, with `choice_R` and `rows_TK` None.
    choice_R: [R] int, the choice t * K + k in each row, sorted by slot; rows_TK: [T, K] int, its inverse, -1 if none.
    ends_s: [s] int32, the end of each slot's rows; on the device, and not waited for.
    weights: as `expert_mlp` takes them, of `x`'s dtype (float32, bfloat16 or float16).

    Returns [R, D]. Rows from ends_s[-1] on are never read, and come out, and go back, as zero. Every sum is in float32
    and in a fixed order: equal inputs give equal bits.
    Raises ValueError for a dtype or activation that has no kernel.
    """
    return _run(_Call(choice_R, rows_TK, ends_s, activation), x, None, weights)


def fused_moe(
    x_TD: Tensor,
    weights_TK: Tensor,
    choice_R: Tensor,
    rows_TK: Tensor,
    ends_s: Tensor,
    weights: Mapping[str, Tensor],
    activation: str,
) -> Tensor:
    """`fused_expert_mlp` and `combine`: each token's rows, summed by router weight [T, K]. Returns [T, D].

    Neither the rows' inputs nor their outputs are saved: the weights' gradients come from the hidden layer's.
    """
    return _run(_Call(choice_R, rows_TK, ends_s, activation), x_TD, weights_TK, weights)


@dataclass(frozen=True, eq=False)
class _Call:
    """What does not take part in the gradient."""

    choice_R: Tensor | None
    rows_TK: Tensor | None
    ends_s: Tensor
    activation: str
    keep_z: bool = True

    @property
    def top_k(self) -> int:
        return 1 if self.rows_TK is None else self.rows_TK.shape[1]


def _run(call: _Call, x: Tensor, scores_TK: Tensor | None, weights: Mapping[str, Tensor]) -> Tensor:
    _check(x, weights, call)
    first = "gate_up_proj" if call.activation == "swiglu" else "up_proj"
    matrices = [weights[first], weights.get(f"{first}_bias"), weights["down_proj"], weights.get("down_proj_bias")]
    tensors = [None if t is None else t.contiguous() for t in (x, scores_TK, *matrices)]
    # Inside forward, autograd no longer tells whether a backward will come.
    keep_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    choice_R, rows_TK = (None if t is None else t.contiguous() for t in (call.choice_R, call.rows_TK))
    call = _Call(choice_R, rows_TK, call.ends_s.contiguous(), call.activation, keep_z)
    out: Tensor = _FusedMlp.apply(call, *tensors)
    return out


def _check(x: Tensor, weights: Mapping[str, Tensor], call: _Call) -> None:
    dtypes = {x.dtype, *(w.dtype for w in weights.values())}
    if len(dtypes) != 1 or x.dtype not in DTYPES:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"The fused experts take inputs and weights of one dtype, float32, bfloat16 or float16, got {found}. Cast "
            "the weights to the inputs' dtype, or use `expert_mlp`."
        )
    if call.activation not in ACTIVATIONS:
        raise ValueError(f"The fused experts know the activations {ACTIVATIONS}, got {call.activation!r}.")
    assert call.ends_s.dtype == torch.int32, call.ends_s.dtype
    assert (call.choice_R is None) == (call.rows_TK is None)


class _FusedMlp(torch.autograd.Function):
    """Forward: up, down and, with scores, combine. Backward: the hidden layer's gradient, then one product for each."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, scores_TK: Tensor | None, *weights: Tensor | None) -> Tensor:
        from swiftmoe_lightning.kernels.triton.gemm_forward import grouped_product, up
        from swiftmoe_lightning.kernels.triton.launch import device_of
        from swiftmoe_lightning.kernels.triton.tiles import choose_tiles, map_rows

        first, first_bias, second, second_bias = weights
        assert first is not None
        assert second is not None
        num_rows = len(x) if call.choice_R is None else len(call.choice_R)
        tiles = choose_tiles(x, num_rows, len(call.ends_s))
        with device_of(x):
            rows = map_rows(call.choice_R, call.top_k, call.ends_s, num_rows, tiles)
            z_RO, a_RF = up(x, first, first_bias, rows, call.activation, call.keep_z)
            y_RD = grouped_product(a_RF, second, second_bias, rows, tiles.down)
        ctx.top_k, ctx.activation, ctx.tiles = call.top_k, call.activation, tiles
        routing = (call.choice_R, call.rows_TK, call.ends_s, rows.slot_B, rows.first_row_B)
        ctx.save_for_backward(x, scores_TK, z_RO, *weights, *routing)
        return y_RD if scores_TK is None else _sum_rows(y_RD, call.rows_TK, scores_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from swiftmoe_lightning.kernels.triton.launch import device_of
        from swiftmoe_lightning.kernels.triton.tiles import Rows

        x, scores_TK, z_RO, *rest = ctx.saved_tensors
        choice_R, rows_TK, ends_s, slot_B, first_row_B = rest[4:]
        rows = Rows(choice_R, ctx.top_k, ends_s, slot_B, first_row_B, len(z_RO), ctx.tiles)
        first, _, second, second_bias = rest[:4]
        saved = _Saved(x, scores_TK, z_RO, first, second, second_bias, rows_TK, ctx.activation)
        with device_of(x):
            return None, *_gradients(grad.contiguous(), saved, rows, ctx.needs_input_grad[1:])


@dataclass(frozen=True, eq=False)
class _Saved:
    """What forward left: x [T or R, D], Z [R, O], first [s, O, D] and second [s, D, F] matrix, and the like."""

    x: Tensor
    scores_TK: Tensor | None
    z_RO: Tensor
    first: Tensor
    second: Tensor
    second_bias: Tensor | None
    rows_TK: Tensor | None
    activation: str


def _gradients(grad: Tensor, saved: _Saved, rows: Rows, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of x, scores, first matrix and bias, second matrix and bias, as far as `needed`, from dO [T, D] or dY [R, D]."""
    from swiftmoe_lightning.kernels.triton.gemm_backward import hidden_gradient, weight_gradient
    from swiftmoe_lightning.kernels.triton.gemm_forward import grouped_product
    from swiftmoe_lightning.kernels.triton.sums_backward import bias_gradient, bias_part, score_gradient

    need_x, need_scores, need_first, need_first_bias, need_second, need_second_bias = needed
    grads: dict[str, Tensor] = {}
    scores_TK, rows_TK = saved.scores_TK, saved.rows_TK
    dz_RO, a_RF, parts = hidden_gradient(grad, scores_TK, saved.second, saved.z_RO, rows, saved.activation)
    if need_second:
        grads["second"] = weight_gradient(grad, a_RF, rows, gathered="" if scores_TK is None else "left")
    # A [R, F] goes before dX [R, D] comes.
    del a_RF
    if need_second_bias:
        grads["second_bias"] = bias_gradient(grad, scores_TK, rows)
    if need_scores and scores_TK is not None and rows_TK is not None and parts is not None:
        if saved.second_bias is not None:
            bias_part(grad, saved.second_bias, rows, parts[-1])
        grads["scores"] = score_gradient(parts, rows_TK, scores_TK.dtype, saved.second_bias is not None)
    if need_first:
        grads["first"] = weight_gradient(dz_RO, saved.x, rows, gathered="" if rows_TK is None else "right")
    if need_first_bias:
        grads["first_bias"] = bias_gradient(dz_RO, None, rows)
    if need_x:
        dx_RD = grouped_product(dz_RO, saved.first, None, rows, rows.tiles.grad_rows, transposed=True)
        grads["x"] = dx_RD if rows_TK is None else _sum_rows(dx_RD, rows_TK)
    return tuple(grads.get(name) for name in ("x", "scores", "first", "first_bias", "second", "second_bias"))


def _sum_rows(y_RD: Tensor, rows_TK: Tensor | None, weights_TK: Tensor | None = None) -> Tensor:
    """[T, D]: sum over k of y[rows[:, k]], weighted if weights are given. No atomics."""
    from swiftmoe_lightning.kernels.triton.rows import gather_sum

    assert rows_TK is not None
    return gather_sum(y_RD, rows_TK, weights_TK)
