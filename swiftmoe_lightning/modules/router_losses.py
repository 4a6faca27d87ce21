"""Keeps a block's router losses from its forward until `auxiliary_loss(module)` reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RouterLosses:
    """The router losses of one MoE block's forwards since they were last read, or since the last backward.

    Reentrant activation checkpointing runs forward first without a graph, and again inside backward. `auxiliary_loss`
    reads the loss of the first run; its gradient is kept here, and the second run sends it into that run's graph.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._was_consumed = False
        self._gradient: Tensor | None = None
        # Autograd's number of the backward in which `_gradient` was summed.
        self._task_id = -1

    # torch.compile cannot trace hooks on intermediate tensors; the experts before this break the graph anyway.
    @torch.compiler.disable
    def attach(self, loss: Tensor | None, out: Tensor, recomputes: bool) -> Tensor:
        """Keep the loss of a forward, and attach it to the graph of the block's output.

        Args:
            loss: [], or None where the forward has none.
            out: the output of the forward's experts.
            recomputes: the forward runs inside backward.

        Returns:
            `out`, or a view of it, to use in its place.
        """
        if recomputes:
            return out if loss is None or not loss.requires_grad else _SendGradient.apply(out, loss, self)
        if self._was_consumed or loss is None:
            self._losses.clear()
            self._was_consumed, self._gradient = False, None
        if loss is not None:
            self._losses.append(loss)
            if out.requires_grad:
                out.register_hook(self._on_backward)
        return out

    def read(self) -> list[Tensor]:
        """The losses since the last read, each []. The next forward drops them."""
        self._was_consumed = True
        with_graph = [loss for loss in self._losses if loss.requires_grad]
        without_graph = [loss for loss in self._losses if not loss.requires_grad]
        if without_graph and torch.is_grad_enabled():
            without_graph = [_KeepGradient.apply(torch.stack(without_graph).sum().requires_grad_(), self)]
        return with_graph + without_graph

    def keep_gradient(self, gradient: Tensor) -> None:
        """Keep the gradient, [], of the losses that have no graph. Each backward starts a new sum."""
        task_id = torch._C._current_graph_task_id()
        kept = self._gradient if task_id == self._task_id else None
        self._gradient, self._task_id = gradient if kept is None else kept + gradient, task_id

    def gradient_for_second_run(self) -> Tensor | None:
        """The kept gradient, for the loss of the second run; None if the first run's loss was not read."""
        self._was_consumed = True
        return self._gradient

    def _on_backward(self, _: Tensor) -> None:
        self._was_consumed = True

    def __deepcopy__(self, _: Any) -> RouterLosses:
        # The losses of a forward belong to its graph, not to a copy of the block.
        return RouterLosses()

    def __reduce__(self) -> Any:
        return RouterLosses, ()


class _KeepGradient(torch.autograd.Function):
    """Forward: identity, of a loss without a graph. Backward: keeps its gradient for the second run of the forward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, losses: RouterLosses) -> Tensor:
        ctx.losses = losses
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.losses.keep_gradient(gradient)
        return None, None


class _SendGradient(torch.autograd.Function):
    """Forward: identity, of a block's output. Backward: sends the kept gradient to the same forward's router loss."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, losses: RouterLosses) -> Tensor:
        ctx.losses = losses
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return gradient, ctx.losses.gradient_for_second_run(), None
