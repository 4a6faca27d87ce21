"""Stands between a layer's router and its experts while its routing is recorded or replayed.

T tokens, E experts, K top-k, R rows of a recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swiftmoe_lightning.modules.chosen_experts import ChosenExperts
from swiftmoe_lightning.modules.load import in_backward
from swiftmoe_lightning.modules.replayed_forwards import ReplayedForwards, same_ids
from swiftmoe_lightning.modules.router import RouterOutput
from swiftmoe_lightning.modules.routing_ids import compact_ids, signed_ids

if TYPE_CHECKING:
    from swiftmoe_lightning.modules.experts import Experts


class RoutingTap:
    """One layer's part of recording and replaying.

    While it is attached, it stands in place of the router's forward. Activation checkpointing repeats forwards inside
    backward, in any order and often after the context has ended, and a repetition must choose as the first run did. So
    the tap stays until no forward that replayed can be repeated.

    Args:
        name: of the experts in the model, for messages.
        experts: the layer's.
        router: gives a `RouterOutput`, or a tuple in which one [T, K] tensor of integers is the expert ids.
    """

    def __init__(self, name: str, experts: Experts, router: nn.Module) -> None:
        self.name = name
        self._experts, self.router = experts, router
        self._recorded: list[Tensor] | None = None
        self._replayed_RK: Tensor | None = None
        self._num_replayed = 0
        self._forwards = ReplayedForwards(name)
        # What the router gave, until the experts take it.
        self._routed_TK: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether a context is recording or replaying."""
        return self._recorded is not None or self._replayed_RK is not None

    @property
    def num_experts(self) -> int:
        """E."""
        return self._experts.num_experts

    def open(self, replayed_RK: Tensor | None) -> None:
        """Begin to replay, or to record.

        Args:
            replayed_RK: [R, K] int, for the next R tokens; None records.

        Raises:
            RuntimeError: when backward repeats a forward in which the context is opened.
        """
        if replayed_RK is not None:
            if in_backward():
                raise RuntimeError(
                    f"replay_routing is opened inside of an activation checkpoint around {self.name!r}, whose "
                    "repetition in backward opens it once more. Open it around the checkpoint, as around the whole "
                    "model. (FAQ: routing-replay)"
                )
            self._forwards.begin()
        self._recorded, self._replayed_RK = [] if replayed_RK is None else None, replayed_RK
        self._num_replayed = 0
        if self._experts.routing_tap is None:
            self._experts.routing_tap = self
            self.router.__dict__["forward"] = _TappedForward(self, self.router.forward)

    def close(self) -> list[Tensor]:
        """End the context. Returns what it recorded, [T, K] of each forward in the smallest unsigned dtype."""
        self._forwards.end()
        recorded, self._recorded, self._replayed_RK = self._recorded or [], None, None
        self._detach_if_unused()
        return recorded

    def check_all_replayed(self) -> None:
        """Check that no row of the recording is left. Raises ValueError."""
        if self._replayed_RK is not None and self._num_replayed != len(self._replayed_RK):
            raise ValueError(
                f"{self.name!r} has routed {self._num_replayed} tokens in this context, and its recording is of "
                f"{len(self._replayed_RK)}. Replay as many tokens as were recorded, in the same order. "
                "(FAQ: routing-replay)"
            )

    @torch.compiler.disable
    def route(self, router: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the router on [..., D]: with the experts of the recording, or as it is, and record its choice.

        Raises:
            ValueError: when the recording is of fewer tokens or of another K, or the router does not choose by one
                top-k of its scores.
            TypeError: when the router's output has no ids.
            RuntimeError: when a forward is repeated in backward that is not known.
        """
        num_tokens = x.numel() // max(x.shape[-1], 1)
        if in_backward():
            return self._run(self._forwards.repeated(x, num_tokens), router, x, *args, **kwargs)
        ids_TK = self._next_ids(num_tokens)
        output = self._run(ids_TK, router, x, *args, **kwargs)
        if self._recorded is not None:
            assert self._routed_TK is not None
            self._recorded.append(compact_ids(self._routed_TK, self.num_experts))
        if ids_TK is not None:
            self._forwards.add(x, ids_TK)
        if not self.is_open:
            self._detach_if_unused()
        return output

    @torch.compiler.disable
    def check_routed(self, expert_ids_TK: Tensor) -> None:
        """Check that the experts get what the router gave, or less of it.

        Args:
            expert_ids_TK: [T, K] int. Those outside 0..E-1 are assignments that a block has left out, as of padding.

        Raises:
            RuntimeError: when the router was not run through this tap, or its ids were changed.
        """
        routed_TK, self._routed_TK = self._routed_TK, None
        if not (self.is_open or (in_backward() and self._forwards)):
            return
        if routed_TK is None or not _holds(routed_TK, expert_ids_TK, self.num_experts):
            raise RuntimeError(
                f"{self.name!r} got other expert ids than its router {type(self.router).__name__} gave, or ran "
                "without it (compiled before the context began?), so its routing can be neither recorded nor replayed. "
                "(FAQ: routing-replay)"
            )

    def _detach_if_unused(self) -> None:
        if not self._forwards:
            self._experts.routing_tap = None
            if isinstance(tapped := self.router.__dict__.get("forward"), _TappedForward):
                tapped.remove_from(self.router)

    def _next_ids(self, num_tokens: int) -> Tensor | None:
        """The recording's next rows, [T, K]."""
        if self._replayed_RK is None:
            return None
        start, end = self._num_replayed, self._num_replayed + num_tokens
        if end > len(self._replayed_RK):
            raise ValueError(
                f"{self.name!r} routes tokens {start}..{end - 1} of this context, and its recording is of "
                f"{len(self._replayed_RK)}. Replay as many tokens as were recorded, in the same order; rows of -1 "
                "stand for tokens without a recording. (FAQ: routing-replay)"
            )
        self._num_replayed = end
        return self._replayed_RK[start:end]

    def _run(self, ids_TK: Tensor | None, router: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if ids_TK is None:
            output = router(x, *args, **kwargs)
            self._routed_TK = self._ids_of(output)
            return output
        chosen_TK = signed_ids(ids_TK, self.num_experts).to(x.device)
        with ChosenExperts(chosen_TK, self.num_experts) as chosen:
            output = router(x, *args, **kwargs)
        self._routed_TK = self._ids_of(output)
        if self._routed_TK.shape != chosen_TK.shape:
            raise ValueError(
                f"the recording of {self.name!r} has {chosen_TK.shape[1]} experts a token, and its router chooses "
                f"{self._routed_TK.shape[1]}. Replay a recording of the same top_k. (FAQ: routing-replay)"
            )
        if len(chosen.ids) != 1 or not same_ids(chosen.ids[0], self._routed_TK):
            raise ValueError(
                f"the router of {self.name!r}, {type(self.router).__name__}, cannot replay: it does not choose "
                f"experts by one torch.topk of scores of shape [tokens, {self.num_experts}] (there were "
                f"{len(chosen.ids)}). Let it do so, and return the ids of that topk. (FAQ: routing-replay)"
            )
        return output

    def _ids_of(self, output: Any) -> Tensor:
        """[T, K] int, of a router's output."""
        if isinstance(output, RouterOutput):
            return output.expert_ids_TK
        parts = output if isinstance(output, tuple) else ()
        ids = [p for p in parts if isinstance(p, Tensor) and p.dim() == 2 and p.dtype in (torch.int64, torch.int32)]
        if len(ids) != 1:
            kinds = [f"{p.dtype} {list(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts]
            raise TypeError(
                f"the router of {self.name!r}, {type(self.router).__name__}, returned "
                f"{kinds or type(output).__name__}: recording and replaying need a RouterOutput, or a tuple with one "
                "[tokens, top_k] tensor of integers, as (logits, weights, expert ids) of Hugging Face's routers. "
                "(FAQ: routing-replay)"
            )
        return ids[0]


class _TappedForward:
    """A router's forward, which runs through a tap. A copy of the router has a forward of its own."""

    def __init__(self, tap: RoutingTap, forward: Callable[..., Any]) -> None:
        self._tap, self._forward = tap, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tap.route(self._forward, *args, **kwargs)

    def remove_from(self, router: nn.Module) -> None:
        """Give the router back the forward that it had."""
        del router.__dict__["forward"]
        if self._forward != router.forward:
            router.__dict__["forward"] = self._forward

    def __reduce__(self) -> Any:
        return self._forward.__reduce__()


def _holds(routed_TK: Tensor, expert_ids_TK: Tensor, num_experts: int) -> bool:
    """Whether ids are the routed ones, where they are of experts."""
    if routed_TK.shape != expert_ids_TK.shape:
        return False
    if routed_TK.data_ptr() == expert_ids_TK.data_ptr():
        return True
    is_left_out_TK = (expert_ids_TK < 0) | (expert_ids_TK >= num_experts)
    return bool((is_left_out_TK | (routed_TK == expert_ids_TK)).all())
