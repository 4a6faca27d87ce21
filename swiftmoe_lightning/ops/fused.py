"""The experts' feed-forward in fused Triton kernels, which gather, activate and weight rows inside the products.

T tokens, D model dim, F hidden dim, K top-k, R rows (assignments sorted by slot), s slots, O out features of the first
matrix (2F for swiglu). Saved for backward: the input, Z [R, O] (before the activation) and the assignments. The plain
version is the unfused path in `layer.py`.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swiftmoe_lightning.ops.activation import ACTIVATIONS
from swiftmoe_lightning.ops.backend import DTYPES
from swiftmoe_lightning.ops.common import refuse_second_derivative, save_nothing
from swiftmoe_lightning.ops.sort import SortedAssignments


def fused_expert_rows(
    x_TD: Tensor, assignments: SortedAssignments, weights: Mapping[str, Tensor], activation: str
) -> Tensor:
    """[T, D] -> [R, D]: down(act(up(x))) of each row's token, with its slot's matrices.

    Args:
        x_TD: [T, D].
        assignments: sorted by slot. The CPU does not wait for them.
        weights: as `expert_mlp` takes them, of `x_TD`'s dtype (float32, bfloat16 or float16).
        activation: one of `ACTIVATIONS`.

    Returns:
        [R, D]. Unassigned rows come out as zero. Every sum is in float32 and in a fixed order: equal inputs give equal
        bits.

    Raises:
        ValueError: for a dtype or activation that has no kernel.
    """
    return _run(x_TD, None, assignments, weights, activation)


def fused_expert_layer(
    x_TD: Tensor,
    weights_TK: Tensor,
    assignments: SortedAssignments,
    weights: Mapping[str, Tensor],
    activation: str,
) -> Tensor:
    """[T, D] -> [T, D]: `fused_expert_rows` and `combine`.

    Neither the rows' inputs nor their outputs are saved: the router weights' gradients come from the hidden layer's.

    Args:
        x_TD: [T, D].
        weights_TK: [T, K] floating, the router's.
        assignments: as in `fused_expert_rows`.
        weights: as in `fused_expert_rows`.
        activation: one of `ACTIVATIONS`.

    Raises:
        ValueError: for a dtype or activation that has no kernel.
    """
    return _run(x_TD, weights_TK, assignments, weights, activation)


def _run(
    x_TD: Tensor,
    scores_TK: Tensor | None,
    assignments: SortedAssignments,
    weights: Mapping[str, Tensor],
    activation: str,
) -> Tensor:
    _check(x_TD, weights, activation)
    assignment_R, rows_TK, _, ends_s = assignments
    assert ends_s.dtype == torch.int32, ends_s.dtype
    first = "gate_up_proj" if activation == "swiglu" else "up_proj"
    matrices = [weights[first], weights.get(f"{first}_bias"), weights["down_proj"], weights.get("down_proj_bias")]
    # Decided here: inside the operator grad mode is off, so it cannot know whether a backward follows.
    keep_z = torch.is_grad_enabled() and _any_requires_grad(x_TD, scores_TK, *matrices)
    tensors = (x_TD, scores_TK, assignment_R, rows_TK, ends_s, *matrices)
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    out: Tensor = _fused(*contiguous, activation, keep_z)[0]
    return out


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(x_TD: Tensor, weights: Mapping[str, Tensor], activation: str) -> None:
    dtypes = {x_TD.dtype, *(w.dtype for w in weights.values())}
    if len(dtypes) != 1 or x_TD.dtype not in DTYPES:
        raise ValueError(
            "The fused experts take inputs and weights of one dtype, float32, bfloat16 or float16, got "
            f"{', '.join(sorted(map(str, dtypes)))}. Cast the weights to the inputs' dtype, or use `expert_mlp`."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"The fused experts know the activations {ACTIVATIONS}, got {activation!r}.")


@torch.library.custom_op("swiftmoe::fused", mutates_args=())
def _fused(  # noqa: PLR0913 - an operator takes tensors one by one
    x_TD: Tensor,
    scores_TK: Tensor | None,
    assignment_R: Tensor,
    rows_TK: Tensor,
    ends_s: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    activation: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """Up, down and, with scores, combine. Returns (out, Z for backward); Z is empty without `keep_z`."""
    from swiftmoe_lightning.ops.triton.fused.product import clear_tail, grouped_product
    from swiftmoe_lightning.ops.triton.fused.up import up
    from swiftmoe_lightning.ops.triton.launch import device_of
    from swiftmoe_lightning.ops.triton.permute import gather_sum

    with device_of(x_TD):
        tiles = _row_tiles(x_TD, assignment_R, rows_TK, ends_s)
        z_RO, a_RF = up(x_TD, first, first_bias, tiles, activation, keep_z)
        y_RD = grouped_product(a_RF, second, second_bias, tiles, tiles.sizes.down)
        out = clear_tail(y_RD, ends_s) if scores_TK is None else gather_sum(y_RD, rows_TK, scores_TK)
    return out, x_TD.new_empty(0) if z_RO is None else z_RO


@_fused.register_fake
def _(x_TD: Tensor, scores_TK: Tensor | None, assignment_R: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, first, _, second, _, _, keep_z = rest
    num_out = assignment_R.shape[0] if scores_TK is None else scores_TK.shape[0]
    z_RO = x_TD.new_empty(assignment_R.shape[0], first.shape[1]) if keep_z else x_TD.new_empty(0)
    return x_TD.new_empty(num_out, second.shape[1]), z_RO


@torch.library.custom_op("swiftmoe::fused_down_backward", mutates_args=())
def _down_backward(  # noqa: PLR0913 - as above
    grad: Tensor,
    scores_TK: Tensor | None,
    assignment_R: Tensor,
    rows_TK: Tensor,
    ends_s: Tensor,
    second: Tensor,
    second_bias: Tensor | None,
    z_RO: Tensor,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    """From dO [T, D] or, without scores, dY [R, D]: dZ, and the gradients of scores, second matrix and bias. Those that
    are not needed are empty."""
    from swiftmoe_lightning.ops.triton.bias import bias_gradient
    from swiftmoe_lightning.ops.triton.fused.hidden_gradient import hidden_gradient
    from swiftmoe_lightning.ops.triton.fused.score_gradient import bias_part, score_gradient
    from swiftmoe_lightning.ops.triton.fused.weight_gradient import weight_gradient
    from swiftmoe_lightning.ops.triton.launch import device_of

    need_scores, need_second, need_bias = needed
    grads = [grad.new_empty(0) for _ in needed]
    with device_of(grad):
        tiles = _row_tiles(grad, assignment_R, rows_TK, ends_s)
        dz_RO, a_RF, parts = hidden_gradient(grad, scores_TK, second, z_RO, tiles, activation)
        if need_scores and scores_TK is not None and parts is not None:
            if second_bias is not None:
                bias_part(grad, second_bias, tiles, parts[-1])
            grads[0] = score_gradient(parts, rows_TK, scores_TK.dtype, second_bias is not None)
        if need_second:
            grads[1] = weight_gradient(grad, a_RF, tiles, gathered="" if scores_TK is None else "left")
        if need_bias:
            grads[2] = bias_gradient(grad, ends_s, scores_TK, assignment_R, tiles.top_k)
    return [dz_RO, *grads]


@_down_backward.register_fake
def _(grad: Tensor, scores_TK: Tensor | None, *rest: Any) -> list[Tensor]:
    _, _, _, second, second_bias, z_RO, _, needed = rest
    return [torch.empty_like(z_RO), *_empty_like([scores_TK, second, second_bias], needed, grad)]


@torch.library.custom_op("swiftmoe::fused_up_backward", mutates_args=())
def _up_backward(  # noqa: PLR0913 - as above
    dz_RO: Tensor,
    x_TD: Tensor,
    assignment_R: Tensor,
    rows_TK: Tensor,
    ends_s: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients of x, first matrix and bias. Those that are not needed are empty."""
    from swiftmoe_lightning.ops.triton.bias import bias_gradient
    from swiftmoe_lightning.ops.triton.fused.product import grouped_product
    from swiftmoe_lightning.ops.triton.fused.weight_gradient import weight_gradient
    from swiftmoe_lightning.ops.triton.launch import device_of
    from swiftmoe_lightning.ops.triton.permute import gather_sum

    need_x, need_first, need_bias = needed
    grads = [dz_RO.new_empty(0) for _ in needed]
    with device_of(x_TD):
        tiles = _row_tiles(x_TD, assignment_R, rows_TK, ends_s)
        if need_first:
            grads[1] = weight_gradient(dz_RO, x_TD, tiles, gathered="right")
        if need_bias:
            grads[2] = bias_gradient(dz_RO, ends_s)
        if need_x:
            dx_RD = grouped_product(dz_RO, first, None, tiles, tiles.sizes.grad_rows, transposed=True)
            grads[0] = gather_sum(dx_RD, rows_TK)
    return grads


@_up_backward.register_fake
def _(dz_RO: Tensor, x_TD: Tensor, *rest: Any) -> list[Tensor]:
    *_, first, first_bias, needed = rest
    return _empty_like([x_TD, first, first_bias], needed, dz_RO)


def _empty_like(tensors: list[Tensor | None], needed: list[bool], grad: Tensor) -> list[Tensor]:
    """Tensors like those that are needed, and of no elements for the others."""
    return [
        grad.new_empty(0) if tensor is None or not need else torch.empty_like(tensor)
        for tensor, need in zip(tensors, needed, strict=True)
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    _, z_RO = output
    ctx.save_for_backward(*tensors, z_RO)
    # Z is an output only so that backward can save it: autograd must not allocate zeros as its gradient.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x_TD, scores_TK, *routing, first, first_bias, second, second_bias, z_RO = ctx.saved_tensors
    need_x, need_scores, _, _, _, *need_weights = ctx.needs_input_grad[:9]
    # Unless the graph is kept, Z is freed before dX is allocated: both are large.
    ctx.maybe_clear_saved_tensors()
    needed = [need_scores, *need_weights[2:]]
    inputs = (grad.contiguous(), scores_TK, *routing, second, second_bias, z_RO)
    dz_RO, *grads = _down_backward(*inputs, ctx.activation, needed)
    del z_RO, inputs
    d_scores, *d_second = _none_unless(needed, grads)
    needed = [need_x, *need_weights[:2]]
    d_x, *d_first = _none_unless(needed, _up_backward(dz_RO, x_TD, *routing, first, first_bias, needed))
    return d_x, d_scores, None, None, None, *d_first, *d_second, None, None


def _none_unless(needed: list[bool], grads: list[Tensor]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


_fused.register_autograd(_backward, setup_context=_save_for_backward)
for _operator in (_down_backward, _up_backward):
    _operator.register_autograd(refuse_second_derivative, setup_context=save_nothing)


def _row_tiles(x: Tensor, assignment_R: Tensor, rows_TK: Tensor, ends_s: Tensor) -> Any:
    """The rows' tiles (`RowTiles`). Backward cuts them again, which costs less than saving them."""
    from swiftmoe_lightning.ops.triton.fused.tiles import choose_tiles, cut_rows

    sizes = choose_tiles(x, len(assignment_R), len(ends_s))
    return cut_rows(assignment_R, rows_TK.shape[1], ends_s, sizes)
