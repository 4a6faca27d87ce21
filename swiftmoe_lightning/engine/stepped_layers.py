"""With several optimizers: which layers' training steps end with a step of which optimizer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from swiftmoe_lightning.engine.layer_state import LayerState


def layers_stepped_by(
    optimizer: Optimizer, others: Iterable[Optimizer], states: Iterable[LayerState]
) -> list[LayerState]:
    """The layers whose training step ends with a step of `optimizer`.

    Those whose experts are in this optimizer. If a layer's experts are in no optimizer, its router decides; if that is
    in none either (all is frozen), every optimizer's step ends the layer's step. Looked up at every step: schedules
    that unfreeze add parameter groups during training.

    Args:
        optimizer: the one that steps.
        others: the other optimizers.
        states: the layers.
    """
    stepped_ids, other_ids = _ids_in([optimizer]), _ids_in(others)

    def is_stepped(state: LayerState) -> bool:
        for module in (state.experts, state.router):
            ids = _ids(module.parameters()) if module is not None else set()
            if not ids.isdisjoint(stepped_ids | other_ids):
                return not ids.isdisjoint(stepped_ids)
        return True

    return [state for state in states if is_stepped(state)]


def _ids_in(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(p) for p in parameters}
