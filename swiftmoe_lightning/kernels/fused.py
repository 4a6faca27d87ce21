"""The experts' feed-forward in fused kernels: rows are gathered, activated and weighted inside the products.

T tokens, D model dim, F hidden dim, K top-k, R rows (surviving choices, sorted by slot), s slots, O out features of the
first matrix (2F for swiglu). Saved for backward: the input, Z [R, O] (before the activation) and the routing.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swiftmoe_lightning.kernels.ops import keep_nothing, refuse_second_derivative
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
    return _run(x, None, choice_R, rows_TK, ends_s, weights, activation)


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
    return _run(x_TD, weights_TK, choice_R, rows_TK, ends_s, weights, activation)


def _run(
    x: Tensor,
    scores_TK: Tensor | None,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    weights: Mapping[str, Tensor],
    activation: str,
) -> Tensor:
    _check(x, weights, activation)
    assert ends_s.dtype == torch.int32, ends_s.dtype
    assert (choice_R is None) == (rows_TK is None)
    first = "gate_up_proj" if activation == "swiglu" else "up_proj"
    matrices = [weights[first], weights.get(f"{first}_bias"), weights["down_proj"], weights.get("down_proj_bias")]
    # Inside the operator, autograd no longer tells whether a backward will come.
    keep_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scores_TK, *matrices))
    tensors = [None if t is None else t.contiguous() for t in (x, scores_TK, choice_R, rows_TK, ends_s, *matrices)]
    out: Tensor = _fused_mlp(*tensors, activation, keep_z)[0]
    return out


def _check(x: Tensor, weights: Mapping[str, Tensor], activation: str) -> None:
    dtypes = {x.dtype, *(w.dtype for w in weights.values())}
    if len(dtypes) != 1 or x.dtype not in DTYPES:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"The fused experts take inputs and weights of one dtype, float32, bfloat16 or float16, got {found}. Cast "
            "the weights to the inputs' dtype, or use `expert_mlp`."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"The fused experts know the activations {ACTIVATIONS}, got {activation!r}.")


@torch.library.custom_op("swiftmoe::fused_mlp", mutates_args=())
def _fused_mlp(  # noqa: PLR0913 - an operator takes tensors one by one
    x: Tensor,
    scores_TK: Tensor | None,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    activation: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """Up, down and, with scores, combine. Returns (out, Z for backward; empty without `keep_z`)."""
    from swiftmoe_lightning.kernels.triton.gemm_forward import grouped_product, up
    from swiftmoe_lightning.kernels.triton.launch import device_of

    with device_of(x):
        rows = _map_rows(x, choice_R, rows_TK, ends_s)
        z_RO, a_RF = up(x, first, first_bias, rows, activation, keep_z)
        y_RD = grouped_product(a_RF, second, second_bias, rows, rows.tiles.down)
        out = y_RD if scores_TK is None else _sum_rows(y_RD, rows_TK, scores_TK)
    return out, x.new_empty(0) if z_RO is None else z_RO


@_fused_mlp.register_fake
def _(  # noqa: PLR0913 - as above
    x: Tensor,
    scores_TK: Tensor | None,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    activation: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    num_rows = x.shape[0] if choice_R is None else choice_R.shape[0]
    num_out = num_rows if scores_TK is None else scores_TK.shape[0]
    z_RO = x.new_empty(num_rows, first.shape[1]) if keep_z else x.new_empty(0)
    return x.new_empty(num_out, second.shape[1]), z_RO


@torch.library.custom_op("swiftmoe::fused_mlp_backward", mutates_args=())
def _fused_mlp_backward(  # noqa: PLR0913 - as above
    grad: Tensor,
    x: Tensor,
    scores_TK: Tensor | None,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    first: Tensor,
    second: Tensor,
    second_bias: Tensor | None,
    z_RO: Tensor,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    """The hidden layer's gradient, then one product for each; those that are not needed come out empty."""
    from swiftmoe_lightning.kernels.triton.launch import device_of

    saved = _Saved(x, scores_TK, z_RO, first, second, second_bias, rows_TK, activation)
    with device_of(x):
        rows = _map_rows(x, choice_R, rows_TK, ends_s)
        found = _gradients(grad.contiguous(), saved, rows, tuple(needed))
    return [x.new_empty(0) if gradient is None else gradient for gradient in found]


@_fused_mlp_backward.register_fake
def _(  # noqa: PLR0913 - as above
    grad: Tensor,
    x: Tensor,
    scores_TK: Tensor | None,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    first: Tensor,
    second: Tensor,
    second_bias: Tensor | None,
    z_RO: Tensor,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    biases = x.new_empty(first.shape[:2]), x.new_empty(second.shape[:2])
    like = (x, x.new_empty(0) if scores_TK is None else scores_TK, first, biases[0], second, biases[1])
    return [t.new_empty(t.shape) if need else x.new_empty(0) for t, need in zip(like, needed, strict=True)]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _fused_mlp_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, scores_TK, choice_R, rows_TK, ends_s, first, _, second, second_bias, z_RO = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needed = [needs[i] for i in (0, 1, 5, 6, 7, 8)]
    saved = (x, scores_TK, choice_R, rows_TK, ends_s, first, second, second_bias, z_RO)
    found = _fused_mlp_backward(grad, *saved, ctx.activation, needed)
    grads = [gradient if need else None for gradient, need in zip(found, needed, strict=True)]
    return (*grads[:2], None, None, None, *grads[2:], None, None)


_fused_mlp.register_autograd(_fused_mlp_gradient, setup_context=_keep_inputs)
_fused_mlp_backward.register_autograd(refuse_second_derivative, setup_context=keep_nothing)


def _map_rows(x: Tensor, choice_R: Tensor | None, rows_TK: Tensor | None, ends_s: Tensor) -> Any:
    """The tile map (`tiles.Rows`): made again in backward, which costs less than to keep it."""
    from swiftmoe_lightning.kernels.triton.tiles import choose_tiles, map_rows

    num_rows = len(x) if choice_R is None else len(choice_R)
    top_k = 1 if rows_TK is None else rows_TK.shape[1]
    return map_rows(choice_R, top_k, ends_s, num_rows, choose_tiles(x, num_rows, len(ends_s)))


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


def _gradients(grad: Tensor, saved: _Saved, rows: "Rows", needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
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
