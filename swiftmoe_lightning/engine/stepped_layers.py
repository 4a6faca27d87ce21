"""Whose `optimizer.step()` ends a layer's training step."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from swiftmoe_lightning.engine.layer_state import LayerState


def layers_stepped_by(
    optimizer: Optimizer, others: Iterable[Optimizer], states: Iterable[LayerState]
) -> list[LayerState]:
    """The layers whose training step ends with a step of `optimizer`.

    Layers whose experts it holds; of those whose experts nobody holds, the ones whose router it holds; and those of
    which nobody holds anything (all is frozen). Looked up at every step: schedules that unfreeze add parameter groups
    during training.

    Args:
        optimizer: that steps.
        others: the optimizers beside it.
        states: the layers to choose from.
    """
    stepped_ids, other_ids = _ids_in([optimizer]), _ids_in(others)

    def is_stepped(t: LayerState) -> bool:
        for part in (t.experts, t.router):
            ids = _ids(part.parameters()) if part is not None else set()
            if not ids.isdisjoint(stepped_ids | other_ids):
                return not ids.isdisjoint(stepped_ids)
        return True

    return [t for t in states if is_stepped(t)]


def _ids_in(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(p) for p in parameters}
