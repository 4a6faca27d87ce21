"""One layer's gradients on this rank: in the slots, under way, and in `.grad` of the sharded parameters.

E experts, r rows of a tensor that this rank owns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from swiftmoe_lightning.distributed import local_shard, phase, sharded_like
from swiftmoe_lightning.engine.gradient_placeholder import GradientPlaceholder, has_gradient
from swiftmoe_lightning.engine.slots import ExpertSlots
from swiftmoe_lightning.engine.weight_exchange import PendingCollection
from swiftmoe_lightning.modules import Experts


class LayerGradients:
    """Takes gradients from the slots to the sharded parameters, unless the user discards them on the way.

    Args:
        experts: the module, with sharded parameters.
        slots: its weights on this rank.
        num_ranks: over which gradients are averaged: those with tokens of their own.
        on_complete: called in backward when it has added all that it will to the gradients of all slots.
    """

    def __init__(self, experts: Experts, slots: ExpertSlots, num_ranks: int, on_complete: Callable[[], None]) -> None:
        self._experts, self._slots, self._num_ranks, self._on_complete = experts, slots, num_ranks, on_complete
        self._placeholders: dict[str, GradientPlaceholder] = {}
        self._watched: dict[str, Tensor] = {}
        self._complete: set[str] = set()
        # Gradients that have left the slots: those under way, and the sums of those that have come.
        self._pending: list[PendingCollection] = []
        self._totals: dict[str, Tensor] = {}

    def watch(self) -> None:
        """Let the slots that are trained say when backward is through with them."""
        for name, slot in self._slots.weights.items():
            if slot.requires_grad and self._watched.get(name) is not slot:
                slot.register_post_accumulate_grad_hook(partial(self._on_gradient, name))
                self._watched[name] = slot

    def _on_gradient(self, name: str, _: Tensor) -> None:
        self._complete.add(name)
        if all(name in self._complete for name, slot in self._slots.weights.items() if slot.requires_grad):
            self._complete.clear()
            self._on_complete()

    def begin_backward(self) -> None:
        """Before backward adds to the slots: put placeholders in `.grad` of the sharded parameters."""
        self._complete.clear()
        self._discard()
        for name, sharded in self._experts.expert_parameters().items():
            # A forward in between, of a frozen reference for one, may have found it otherwise.
            self._slots.weights[name].requires_grad_(sharded.requires_grad)
            if sharded.requires_grad and name not in self._placeholders:
                self._placeholders[name] = GradientPlaceholder(sharded)

    def _discard(self) -> None:
        """Forget the gradients that the user has discarded (`zero_grad`, `p.grad = None`), wherever they are."""
        parameters = self._experts.expert_parameters()
        for name, placeholder in list(self._placeholders.items()):
            if placeholder.was_discarded(parameters[name]):
                self._placeholders.pop(name).release()
                self._slots.weights[name].grad = None
                self._totals.pop(name, None)
                for collection in self._pending:
                    collection.discarded.add(name)

    def are_waiting(self) -> bool:
        """Whether some are neither in `.grad` nor discarded by the user: in the slots, or under way."""
        self._discard()
        return self._slots.has_gradients or bool(self._totals) or bool(self._pending)

    def start_collection(self) -> PendingCollection | None:
        """Begin to send the gradients in the slots to the ranks that own their rows. A collective.

        Returns:
            None when there are none.
        """
        self._discard()
        collection = self._slots.start_collection()
        if collection is not None:
            self._pending.append(collection)
        return collection

    @torch.no_grad()
    def finish_collection(self, collection: PendingCollection) -> None:
        """Keep the sums of a collection that is through until the end of backward."""
        with phase("collect"):
            parameters = self._experts.expert_parameters()
            device = next(iter(parameters.values())).device
            for name, total in collection.means(self._num_ranks, device).items():
                if name in self._totals:
                    self._slots.join((self._totals[name], total))
                    total = self._totals[name].add_(total)
                self._totals[name] = total
                if name in self._placeholders:
                    self._placeholders[name].hold(parameters[name], total)
            self._pending.remove(collection)

    @torch.no_grad()
    def add_to_parameters(self) -> None:
        """Add the collected sums to `.grad` of the parameters; the user's hooks on them run."""
        parameters = self._experts.expert_parameters()
        totals, self._totals = self._totals, {}
        self._slots.join(totals.values())
        for name, total in totals.items():
            placeholder = self._placeholders.pop(name, None)
            accumulate_gradient(parameters[name], total.to(local_shard(parameters[name])))
            if placeholder is not None:
                # It and its gradient refer to each other, and would wait for the garbage collector.
                placeholder.release()


def accumulate_gradient(sharded: nn.Parameter, shard: Tensor) -> None:
    """Add this rank's rows of a gradient to `.grad`, as autograd does for a leaf.

    First tensor hooks, which may replace the gradient, then the addition, then post-accumulate hooks.
    """
    gradient: Tensor = sharded_like(shard, sharded)
    for hook in (sharded._backward_hooks or {}).values():
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    if has_gradient(sharded):
        assert sharded.grad is not None
        local_shard(sharded.grad).add_(local_shard(gradient))
    else:
        sharded.grad = gradient
    for hook in (getattr(sharded, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(sharded)
