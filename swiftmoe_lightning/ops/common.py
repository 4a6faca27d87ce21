"""What the operations share: how their sums are widened, and what an operator's gradient does beside its own sums.

Each operation is a file `x.py`: a public function; the plain torch version that defines what is right (`eager_x`); and
a custom operator with its fake and its gradient. The operator's body runs Triton's kernels (`triton/x.py`) or the eager
version; outside the body nothing knows which, so `torch.compile`, activation checkpointing and autograd treat both
alike. A backward is an operator of its own, since the compiler traces the gradient with fake tensors. Where
`runs_eagerly`, the public function calls the eager version without its operator, whose way through torch's dispatcher
takes longer than a small layer's sums: as an autograd function (`_EagerX`), whose `backward` is also the operator's.
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
    """Which of the two computes a gradient: the operator also where that gradient may be differentiated in its turn,
    for the operator says why it cannot be.

    Args:
        operator: the custom operator.
        eager: its eager version.
        *tensors: the floating tensors of either, the incoming gradient first.
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
    """For `refuse_second_derivative`, which needs nothing of the forward."""
