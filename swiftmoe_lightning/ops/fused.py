"""The experts' feed-forward in fused kernels: rows are gathered, activated and weighted inside the products.

T tokens, D model dim, F hidden dim, K top-k, R rows (surviving choices, sorted by slot), s slots, O out features of the
first matrix (2F for swiglu). Saved for backward: the input, Z [R, O] (before the activation) and the routing.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swiftmoe_lightning.ops.backend import DTYPES
from swiftmoe_lightning.ops.operators import keep_nothing, refuse_second_derivative
from swiftmoe_lightning.ops.reference import ACTIVATIONS


def fused_expert_mlp(
    x: Tensor,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    weights: Mapping[str, Tensor],
    activation: str,
) -> Tensor:
    """down(act(up(x))) of each row, with its own slot's matrices.

    Args:
        x: [T, D]; row r is token choice_R[r] // K. Or [R, D], the rows, with `choice_R` and `rows_TK` None.
        choice_R: [R] int, the choice t * K + k in each row, sorted by slot.
        rows_TK: [T, K] int, its inverse, -1 if none.
        ends_s: [s] int32, the end of each slot's rows; on the device, and not waited for.
        weights: as `expert_mlp` takes them, of `x`'s dtype (float32, bfloat16 or float16).
        activation: one of `ACTIVATIONS`.

    Returns:
        [R, D]. Rows from ends_s[-1] on are never read, and come out, and go back, as zero. Every sum is in float32
        and in a fixed order: equal inputs give equal bits.

    Raises:
        ValueError: for a dtype or activation that has no kernel.
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
    """[T, D] -> [T, D]: `fused_expert_mlp` and `combine`: each token's rows, summed by router weight [T, K].

    Arguments are as in `fused_expert_mlp`, none of them None. Neither the rows' inputs nor their outputs are saved:
    the weights' gradients come from the hidden layer's.

    Raises:
        ValueError: for a dtype or activation that has no kernel.
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
    from swiftmoe_lightning.ops.triton.gemm_forward import grouped_product, up
    from swiftmoe_lightning.ops.triton.launch import device_of
    from swiftmoe_lightning.ops.triton.rows import clear_tail

    with device_of(x):
        rows = _map_rows(x, choice_R, rows_TK, ends_s)
        z_RO, a_RF = up(x, first, first_bias, rows, activation, keep_z)
        y_RD = grouped_product(a_RF, second, second_bias, rows, rows.tiles.down)
        out = clear_tail(y_RD, ends_s) if scores_TK is None else _sum_rows(y_RD, rows_TK, scores_TK)
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


@torch.library.custom_op("swiftmoe::fused_down_backward", mutates_args=())
def _down_backward(  # noqa: PLR0913 - as above
    grad: Tensor,
    scores_TK: Tensor | None,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    second: Tensor,
    second_bias: Tensor | None,
    z_RO: Tensor,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    """From dO [T, D] or dY [R, D]: dZ, and the gradients of scores, second matrix and bias; not needed, empty."""
    from swiftmoe_lightning.ops.triton.bias import bias_gradient, bias_part
    from swiftmoe_lightning.ops.triton.grad_hidden import hidden_gradient, score_gradient
    from swiftmoe_lightning.ops.triton.grad_weight import weight_gradient
    from swiftmoe_lightning.ops.triton.launch import device_of

    need_scores, need_second, need_bias = needed
    grads = [grad.new_empty(0) for _ in needed]
    with device_of(grad):
        rows = _map_rows(grad, choice_R, rows_TK, ends_s)
        dz_RO, a_RF, parts = hidden_gradient(grad, scores_TK, second, z_RO, rows, activation)
        if need_scores and scores_TK is not None and rows_TK is not None and parts is not None:
            if second_bias is not None:
                bias_part(grad, second_bias, rows, parts[-1])
            grads[0] = score_gradient(parts, rows_TK, scores_TK.dtype, second_bias is not None)
        if need_second:
            grads[1] = weight_gradient(grad, a_RF, rows, gathered="" if scores_TK is None else "left")
        if need_bias:
            grads[2] = bias_gradient(grad, ends_s, scores_TK, choice_R, rows.top_k)
    return [dz_RO, *grads]


@_down_backward.register_fake
def _(  # noqa: PLR0913 - as above
    grad: Tensor,
    scores_TK: Tensor | None,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    second: Tensor,
    second_bias: Tensor | None,
    z_RO: Tensor,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    return [torch.empty_like(z_RO), *_like([scores_TK, second, second_bias], needed, grad)]


@torch.library.custom_op("swiftmoe::fused_up_backward", mutates_args=())
def _up_backward(  # noqa: PLR0913 - as above
    dz_RO: Tensor,
    x: Tensor,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients of x, first matrix and bias; those that are not needed come out empty."""
    from swiftmoe_lightning.ops.triton.bias import bias_gradient
    from swiftmoe_lightning.ops.triton.gemm_forward import grouped_product
    from swiftmoe_lightning.ops.triton.grad_weight import weight_gradient
    from swiftmoe_lightning.ops.triton.launch import device_of
    from swiftmoe_lightning.ops.triton.rows import clear_tail

    need_x, need_first, need_bias = needed
    grads = [dz_RO.new_empty(0) for _ in needed]
    with device_of(x):
        rows = _map_rows(x, choice_R, rows_TK, ends_s)
        if need_first:
            grads[1] = weight_gradient(dz_RO, x, rows, gathered="" if rows_TK is None else "right")
        if need_bias:
            grads[2] = bias_gradient(dz_RO, ends_s)
        if need_x:
            dx_RD = grouped_product(dz_RO, first, None, rows, rows.tiles.grad_rows, transposed=True)
            grads[0] = clear_tail(dx_RD, ends_s) if rows_TK is None else _sum_rows(dx_RD, rows_TK)
    return grads


@_up_backward.register_fake
def _(  # noqa: PLR0913 - as above
    dz_RO: Tensor,
    x: Tensor,
    choice_R: Tensor | None,
    rows_TK: Tensor | None,
    ends_s: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    return _like([x, first, first_bias], needed, dz_RO)


def _like(tensors: list[Tensor | None], needed: list[bool], of: Tensor) -> list[Tensor]:
    return [
        of.new_empty(0) if t is None or not n else torch.empty_like(t) for t, n in zip(tensors, needed, strict=True)
    ]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    # Z is an output for backward's sake alone: nobody is to make zeros for its gradient.
    ctx.set_materialize_grads(False)


def _fused_mlp_gradient(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, scores_TK, *routing, first, first_bias, second, second_bias, z_RO = ctx.saved_tensors
    need_x, need_scores, _, _, _, *need_weights = ctx.needs_input_grad[:9]
    # Unless the graph is kept, Z goes before dX comes: both are large.
    ctx.maybe_clear_saved_tensors()
    needed = [need_scores, *need_weights[2:]]
    inputs = (grad.contiguous(), scores_TK, *routing, second, second_bias, z_RO)
    dz_RO, *found = _down_backward(*inputs, ctx.activation, needed)
    del z_RO, inputs
    d_scores, *d_second = _only(needed, found)
    needed = [need_x, *need_weights[:2]]
    d_x, *d_first = _only(needed, _up_backward(dz_RO, x, *routing, first, first_bias, needed))
    return d_x, d_scores, None, None, None, *d_first, *d_second, None, None


def _only(needed: list[bool], found: list[Tensor]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(found, needed, strict=True)]


_fused_mlp.register_autograd(_fused_mlp_gradient, setup_context=_keep_inputs)
for _operator in (_down_backward, _up_backward):
    _operator.register_autograd(refuse_second_derivative, setup_context=keep_nothing)


def _map_rows(x: Tensor, choice_R: Tensor | None, rows_TK: Tensor | None, ends_s: Tensor) -> Any:
    """The tile map (`tiles.Rows`): made again in backward, which costs less than to keep it."""
    from swiftmoe_lightning.ops.triton.tiles import choose_tiles, map_rows

    num_rows = len(x) if choice_R is None else len(choice_R)
    top_k = 1 if rows_TK is None else rows_TK.shape[1]
    return map_rows(choice_R, top_k, ends_s, num_rows, choose_tiles(x, num_rows, len(ends_s)))


def _sum_rows(y_RD: Tensor, rows_TK: Tensor | None, weights_TK: Tensor | None = None) -> Tensor:
    """[T, D]: sum over k of y[rows[:, k]], weighted if weights are given. No atomics."""
    from swiftmoe_lightning.ops.triton.rows import gather_sum

    assert rows_TK is not None
    return gather_sum(y_RD, rows_TK, weights_TK)
