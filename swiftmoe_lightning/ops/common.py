"""How an operation is built, and what operations share: the dtype of sums, and the gradients of custom operators.

Each operation is a file `x.py`: a public function; the plain torch version that defines what is right (`eager_x`); and
a custom operator with its fake and its gradient. The operator's body runs Triton's kernels (`triton/x.py`) or the eager
version. Code outside the body does not depend on which, so `torch.compile`, activation checkpointing and autograd treat
both alike. A backward is an operator of its own, since the compiler traces the gradient with fake tensors. Where
`runs_eagerly` is true, the public function calls the eager version as an autograd function (`_EagerX`, whose `backward`
is also the operator's): torch's dispatch of a custom operator takes longer than a small layer's sums. Operations on
whole numbers have no gradient: outside of `torch.compile` their bodies are called as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swiftmoe_lightning.ops.backend import runs_eagerly


def sum_dtype(x: Tensor) -> torch.dtype:
    """Sums are taken in float32, or in float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def choose_gradient(operator: Any, eager: Any, *tensors: Tensor) -> Any:
    """The function that computes a gradient, `operator` or `eager`.

    With create_graph=True it is always the operator, whose own gradient raises a clear error.

    Args:
        operator: the custom operator.
        eager: its eager version.
        *tensors: their floating inputs, the incoming gradient first.
    """
    return operator if torch.is_grad_enabled() or not runs_eagerly(*tensors) else eager


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    """The gradient of a gradient operator.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "swiftmoe_lightning's operations have no second derivative: call backward() or torch.autograd.grad() without "
        "create_graph=True, or keep them out of what is differentiated twice."
    )


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The `setup_context` beside `refuse_second_derivative`, which needs nothing saved."""
