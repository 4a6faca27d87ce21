"""Remembers what forwards replayed, for as long as activation checkpointing may repeat them.

T tokens, D model dim, K top-k.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

# How far the fingerprints of one forward and its repetition may be apart: what sums in another order change.
_TOLERANCE: Final = 1e-2


@dataclass(frozen=True, eq=False)
class _Forward:
    """A forward that replayed: its input's size and fingerprint, its experts, and what lives while it may repeat."""

    num_tokens: int
    fingerprint_D: Tensor
    ids_TK: Tensor
    checkpoints: list[weakref.ref[Any]]


@dataclass(eq=False)
class _Context:
    """One `replay_routing`, and the range of autograd's numbers of the nodes that were made inside."""

    start: int
    end: int | None = None
    forwards: list[_Forward] = field(default_factory=list)


class ReplayedForwards:
    """The forwards of one layer that replayed a recording and that backward may repeat.

    Autograd numbers its nodes in the order of their making. A forward is repeated while backward runs a node of its
    own, so this node's number says whether it was a replay, and in which context. Those of one context are told apart
    by a fingerprint of the router's input.

    Args:
        name: of the layer, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._contexts: list[_Context] = []

    def __bool__(self) -> bool:
        """Whether there are any, and the others are forgotten."""
        for context in self._contexts:
            context.forwards = [f for f in context.forwards if any(ref() is not None for ref in f.checkpoints)]
        self._contexts = [context for context in self._contexts if context.forwards or context.end is None]
        return any(context.forwards for context in self._contexts)

    def begin(self) -> None:
        """From now on forwards replay."""
        self._contexts.append(_Context(_next_number()))

    def end(self) -> None:
        """From now on they are live."""
        for context in self._contexts:
            if context.end is None:
                context.end = _next_number()

    def add(self, x: Tensor, ids_TK: Tensor) -> None:
        """Remember a replay, if it is checkpointed.

        Args:
            x: [..., D], the router's input.
            ids_TK: [T, K] int, what it replays.
        """
        checkpoints = [weakref.ref(checkpoint) for checkpoint in _checkpoints()]
        if checkpoints:
            self._contexts[-1].forwards.append(_Forward(len(ids_TK), _fingerprint(x), ids_TK, checkpoints))

    def repeated(self, x: Tensor, num_tokens: int) -> Tensor | None:
        """What the forward that is repeated now replayed, [T, K]; None: it was live.

        Args:
            x: [..., D], the router's input.
            num_tokens: T.

        Raises:
            RuntimeError: when it is not known.
        """
        number = _running_node()._sequence_nr()
        context = next((c for c in self._contexts if c.start <= number and (c.end is None or number < c.end)), None)
        if context is None:
            return None
        fingerprint_D = _fingerprint(x)
        scale = fingerprint_D.norm().clamp(min=torch.finfo(fingerprint_D.dtype).tiny)
        known = [f for f in context.forwards if f.num_tokens == num_tokens]
        distances = [float((f.fingerprint_D - fingerprint_D).norm() / scale) for f in known]
        nearest = [f.ids_TK for f, d in zip(known, distances, strict=True) if d == min(distances)]
        if not nearest or not min(distances) <= _TOLERANCE:
            reason = "with another input than it had"
        elif any(not same_ids(nearest[0], other) for other in nearest[1:]):
            reason = "that had the same input as another one of its context, which replayed other experts"
        else:
            return nearest[0]
        raise RuntimeError(
            f"activation checkpointing repeats a forward of {self._name!r} {reason}, so what it replayed is not known. "
            "Run backward before weights change, let dropout repeat (preserve_rng_state=True), and open one context "
            "for each forward of the same input. (FAQ: routing-replay)"
        )


def same_ids(left: Tensor, right: Tensor) -> bool:
    """Whether both are the same, without a look at the values where they share memory.

    Args:
        left: of any integer dtype.
        right: of any integer dtype.
    """
    if left.shape != right.shape:
        return False
    return left.data_ptr() == right.data_ptr() or bool(torch.equal(left.to(torch.int64), right.to(torch.int64)))


def _checkpoints() -> Iterator[object]:
    """What backward keeps alive while it may repeat the forward that runs now."""
    # use_reentrant=False: the hook that repeats the forward for a tensor that it would have saved.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        yield hooks[1]
    # use_reentrant=True, and checkpoints of other libraries: the autograd function whose forward this is a part of.
    for frame in _frames():
        for name in frame.f_code.co_varnames[:1]:
            if issubclass(type(first := frame.f_locals.get(name)), FunctionCtx):
                yield first


def _running_node() -> Any:
    """The autograd node of a first run that backward runs now.

    A reentrant repetition runs a backward of its own: then the outermost node is that of the first run.
    """
    nodes = [f.f_locals["self"] for f in _frames() if f.f_code is BackwardCFunction.apply.__code__]
    return nodes[-1] if nodes else torch._C._current_autograd_node()


def _frames() -> Iterator[FrameType]:
    """Python's stack, from here outwards."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _next_number() -> int:
    """What autograd will number the next node of this thread with."""
    return int(torch._C._autograd._get_sequence_nr())


def _fingerprint(x: Tensor) -> Tensor:
    """[D], a sum of the tokens by weights that differ and nearly cancel, so that no common offset covers the rest."""
    x_TD = x.detach().reshape(-1, x.shape[-1])
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    weights_T = torch.cos(2.4 * torch.arange(len(x_TD), device=x_TD.device, dtype=x_TD.dtype))
    with torch.autocast(x_TD.device.type, enabled=False):
        return weights_T @ x_TD
