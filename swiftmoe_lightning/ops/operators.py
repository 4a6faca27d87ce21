"""The operations as torch sees them: one custom operator each, with its fake, its gradient and its two paths.

An operator's body picks Triton or the reference (`backend.choose`); outside the body nothing knows of it, so
`torch.compile`, activation checkpointing and autograd treat both alike. A backward is an operator of its own, since
the compiler traces through the gradient with fake tensors. Where the reference runs on plain tensors and nobody
compiles, it is called without its operator, whose way through the dispatcher takes longer than a small layer's sums.
Letters as in `reference.py`.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swiftmoe_lightning.config import check_choice
from swiftmoe_lightning.ops import backend, reference


class SortedChoices(NamedTuple):
    """What `sort_choices` returns; all int32.

    Attributes:
        choice_N: [N], the choice in each row; behind the last row -1.
        row_N: [N], its inverse: the row of each choice, -1 for unassigned.
        counts_G: [G], rows of each group.
        ends_G: [G], where they end; R is ends_G[-1].
    """

    choice_N: Tensor
    row_N: Tensor
    counts_G: Tensor
    ends_G: Tensor


def sort_choices(key_N: Tensor, num_groups: int) -> SortedChoices:
    """Sort choices by group, keeping the order inside one.

    How many rows there are (R <= N) only the device knows, and it is not asked: the tensors have length N, and
    `permute`, `combine` pass over rows and choices marked -1.

    Args:
        key_N: [N] int32 or int64, the group of each choice; outside 0..G-1 it is unassigned.
        num_groups: G.
    """
    sort = reference.sort_choices if is_plain(key_N, ()) else _sort_choices
    return SortedChoices(*sort(key_N, num_groups))


def permute(x_TD: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    """Copy tokens to rows: [T, D] -> [R, D]; a row that is unassigned is zero.

    Backward sums each token's rows, without atomics.

    Args:
        x_TD: [T, D] floating.
        choice_R: [R] int32 or int64, the choice t * K + k in each row, -1 if unassigned.
        rows_TK: [T, K], its inverse, -1 where a choice has no row.
    """
    assert x_TD.shape[0] == rows_TK.shape[0], (x_TD.shape, rows_TK.shape)
    permute = _PlainPermute.apply if is_plain(x_TD, (x_TD,)) else _permute
    return permute(x_TD, choice_R, rows_TK)


def combine(y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    """Weighted sum of each token's rows: [R, D] -> [T, D] in the dtype of `y_RD`; a choice without a row adds zero.

    Args:
        y_RD: [R, D] floating. What unassigned rows hold is not read.
        weights_TK: [T, K] floating, of any dtype.
        choice_R: as in `permute`.
        rows_TK: as in `permute`.
    """
    assert weights_TK.shape == rows_TK.shape, (weights_TK.shape, rows_TK.shape)
    assert y_RD.shape[0] == choice_R.shape[0], (y_RD.shape, choice_R.shape)
    combine = _PlainCombine.apply if is_plain(y_RD, (y_RD, weights_TK)) else _combine
    return combine(y_RD, weights_TK, choice_R, rows_TK)


def activate(z_RF: Tensor, activation: str) -> Tensor:
    """The experts' activation: [R, 2F] -> [R, F] for "swiglu" (the gate's half first), [R, F] -> [R, F] for others.

    Args:
        z_RF: [R, 2F] or [R, F] floating.
        activation: one of `ACTIVATIONS`.

    Raises:
        ValueError: for any other activation.
    """
    check_choice("activation", activation, reference.ACTIVATIONS)
    assert activation != "swiglu" or z_RF.shape[1] % 2 == 0, z_RF.shape
    activate = _PlainActivate.apply if is_plain(z_RF, (z_RF,)) else _activate
    return activate(z_RF, activation)


def is_plain(first: Tensor, floating: tuple[Tensor, ...]) -> bool:
    """Whether the reference may run without its operator.

    Args:
        first: the operation's first tensor.
        floating: its floating tensors.
    """
    if torch.compiler.is_compiling() or type(first) not in (Tensor, nn.Parameter):
        return False
    return not backend.is_triton(first.device, *(t.dtype for t in floating))


def on_triton(*tensors: Tensor) -> bool:
    """Whether the operation on these floating tensors runs Triton."""
    found: bool = backend.is_triton(tensors[0].device, *[t.dtype for t in tensors])
    return found


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    """The gradient of a gradient operator.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "swiftmoe_lightning's operations have no second derivative: call backward() or torch.autograd.grad() without "
        "create_graph=True, or keep them out of what is differentiated twice."
    )


def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For `refuse_second_derivative`, which needs none."""


def keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """For backward: all tensors that came in."""
    ctx.save_for_backward(*inputs)


def keep_third(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """For backward: where rows are, which comes third."""
    ctx.save_for_backward(inputs[2])


@torch.library.custom_op("swiftmoe::sort_choices", mutates_args=())
def _sort_choices(key_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend.is_triton(key_N.device):
        from swiftmoe_lightning.ops.triton import sorting

        return sorting.sort_choices(key_N, num_groups)
    return reference.sort_choices(key_N, num_groups)


@_sort_choices.register_fake
def _(key_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (key_N.shape[0], key_N.shape[0], num_groups, num_groups)
    first, second, third, fourth = (key_N.new_empty(size, dtype=torch.int32) for size in sizes)
    return first, second, third, fourth


@torch.library.custom_op("swiftmoe::permute", mutates_args=())
def _permute(x_TD: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    if on_triton(x_TD):
        from swiftmoe_lightning.ops.triton import rows

        return rows.permute(x_TD, choice_R, rows_TK)
    return reference.permute(x_TD, choice_R, rows_TK)


@_permute.register_fake
def _(x_TD: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    return x_TD.new_empty(choice_R.shape[0], x_TD.shape[1])


@torch.library.custom_op("swiftmoe::gather_sum", mutates_args=())
def _gather_sum(y_RD: Tensor, rows_TK: Tensor) -> Tensor:
    if on_triton(y_RD):
        from swiftmoe_lightning.ops.triton import rows

        return rows.gather_sum(y_RD, rows_TK)
    return reference.gather_sum(y_RD, rows_TK)


@_gather_sum.register_fake
def _(y_RD: Tensor, rows_TK: Tensor) -> Tensor:
    return y_RD.new_empty(rows_TK.shape[0], y_RD.shape[1])


@torch.library.custom_op("swiftmoe::combine", mutates_args=())
def _combine(y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    if on_triton(y_RD, weights_TK):
        from swiftmoe_lightning.ops.triton import rows

        return rows.gather_sum(y_RD, rows_TK, weights_TK)
    return reference.combine(y_RD, weights_TK, choice_R, rows_TK)


@_combine.register_fake
def _(y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    return y_RD.new_empty(rows_TK.shape[0], y_RD.shape[1])


@torch.library.custom_op("swiftmoe::combine_backward", mutates_args=())
def _combine_backward(
    grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor
) -> tuple[Tensor, Tensor]:
    if on_triton(y_RD, weights_TK):
        from swiftmoe_lightning.ops.triton import rows

        return rows.combine_backward(grad_TD, y_RD, weights_TK, choice_R, rows_TK)
    return reference.combine_backward(grad_TD, y_RD, weights_TK, choice_R, rows_TK)


@_combine_backward.register_fake
def _(grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor) -> tuple[Tensor, Tensor]:
    return y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)


@torch.library.custom_op("swiftmoe::activate", mutates_args=())
def _activate(z_RF: Tensor, activation: str) -> Tensor:
    if on_triton(z_RF):
        from swiftmoe_lightning.ops.triton import activation as kernel

        return kernel.activate(z_RF, activation)
    return reference.activate(z_RF, activation)


@_activate.register_fake
def _(z_RF: Tensor, activation: str) -> Tensor:
    return z_RF.new_empty(z_RF.shape[0], z_RF.shape[1] // (2 if activation == "swiglu" else 1))


@torch.library.custom_op("swiftmoe::activate_backward", mutates_args=())
def _activate_backward(grad_RF: Tensor, z_RF: Tensor, activation: str) -> Tensor:
    if on_triton(z_RF):
        from swiftmoe_lightning.ops.triton import activation as kernel

        return kernel.activate_backward(grad_RF, z_RF, activation)
    return reference.activate_backward(grad_RF, z_RF, activation)


@_activate_backward.register_fake
def _(grad_RF: Tensor, z_RF: Tensor, activation: str) -> Tensor:
    return z_RF.new_empty(z_RF.shape)


def backward_of(ctx: Any, operator: Any, plain: Any) -> Any:
    """The operator, too, where its gradient may be asked for: it says why there is none."""
    return plain if getattr(ctx, "is_plain", False) and not torch.is_grad_enabled() else operator


def _permute_gradient(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
    return backward_of(ctx, _gather_sum, reference.gather_sum)(grad_RD, *ctx.saved_tensors), None, None


def _combine_gradient(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
    backward = backward_of(ctx, _combine_backward, reference.combine_backward)
    return *backward(grad_TD, *ctx.saved_tensors), None, None


def _keep_activation(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    z_RF, ctx.activation = inputs
    ctx.save_for_backward(z_RF)


def _activate_gradient(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None]:
    backward = backward_of(ctx, _activate_backward, reference.activate_backward)
    return backward(grad_RF, *ctx.saved_tensors, ctx.activation), None


_permute.register_autograd(_permute_gradient, setup_context=keep_third)
_combine.register_autograd(_combine_gradient, setup_context=keep_inputs)
_activate.register_autograd(_activate_gradient, setup_context=_keep_activation)
for _operator in (_gather_sum, _combine_backward, _activate_backward):
    _operator.register_autograd(refuse_second_derivative, setup_context=keep_nothing)


def plain_function(forward: Any, keep: Any, gradient: Any) -> Any:
    """The reference as a function that autograd knows, with the gradient of its operator.

    Args:
        forward: the reference.
        keep: the operator's `setup_context`.
        gradient: its backward.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_plain = True
        keep(ctx, inputs, output)

    functions = {"forward": forward, "setup_context": setup_context, "backward": gradient}
    return type(forward.__name__, (torch.autograd.Function,), {k: staticmethod(f) for k, f in functions.items()})


_PlainPermute = plain_function(reference.permute, keep_third, _permute_gradient)
_PlainCombine = plain_function(reference.combine, keep_inputs, _combine_gradient)
_PlainActivate = plain_function(reference.activate, _keep_activation, _activate_gradient)
