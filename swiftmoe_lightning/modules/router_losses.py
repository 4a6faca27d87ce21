"""The way of a block's router losses into the loss of the model: by `auxiliary_loss(module)`, after forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RouterLosses:
    """The router losses of one MoE block's forwards since they were last read, or trained.

    Reentrant activation checkpointing runs forward without a graph, and again inside backward. The first run has the
    value, the second the graph: what reads the value leaves its gradient here, where the second run finds it.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._is_old = False
        self._gradient: Tensor | None = None
        self._backward = -1

    # Hooks on what is between two layers would not compile; the experts before it break the graph anyway.
    @torch.compiler.disable
    def hand_over(self, loss: Tensor | None, out: Tensor, recomputes: bool) -> Tensor:
        """Take the loss of a forward.

        Args:
            loss: [], or None where the forward has none.
            out: what the forward's experts gave.
            recomputes: the forward runs inside backward.

        Returns:
            `out`, to be used in its place.
        """
        if recomputes:
            return out if loss is None or not loss.requires_grad else _Carry.apply(out, loss, self)
        if self._is_old or loss is None:
            self._losses.clear()
            self._is_old, self._gradient = False, None
        if loss is not None:
            self._losses.append(loss)
            if out.requires_grad:
                out.register_hook(self._end)
        return out

    def read(self) -> list[Tensor]:
        """The losses since the last read, each []; the next forward begins anew."""
        self._is_old = True
        with_graph = [loss for loss in self._losses if loss.requires_grad]
        without = [loss for loss in self._losses if not loss.requires_grad]
        if without and torch.is_grad_enabled():
            without = [_Read.apply(torch.stack(without).sum().requires_grad_(), self)]
        return with_graph + without

    def keep_gradient(self, gradient: Tensor) -> None:
        """Keep the gradient, [], of the losses that have no graph. Each backward begins anew."""
        backward = torch._C._current_graph_task_id()
        before = self._gradient if backward == self._backward else None
        self._gradient, self._backward = gradient if before is None else before + gradient, backward

    def gradient_in_rerun(self) -> Tensor | None:
        """What was kept, for the loss of a forward that was run again; None if nobody read the first run's."""
        self._is_old = True
        return self._gradient

    def _end(self, _: Tensor) -> None:
        self._is_old = True

    def __deepcopy__(self, _: Any) -> RouterLosses:
        # The losses of a forward belong to its graph, not to a copy of the block.
        return RouterLosses()

    def __reduce__(self) -> Any:
        return RouterLosses, ()


class _Read(torch.autograd.Function):
    """A loss without a graph -> itself. Backward: keeps the gradient for the forward that is run again."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, losses: RouterLosses) -> Tensor:
        ctx.losses = losses
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.losses.keep_gradient(gradient)
        return None, None


class _Carry(torch.autograd.Function):
    """A block's output -> itself. Backward: the router loss of the same forward gets the gradient that was kept."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, losses: RouterLosses) -> Tensor:
        ctx.losses = losses
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return gradient, ctx.losses.gradient_in_rerun(), None
