"""Records which experts tokens were routed to, and routes by it again: routing replay, or R3 (arXiv 2510.11370).

T tokens, E experts, K top-k, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from swiftmoe_lightning.modules.expert_choice import ExpertChoiceRouter
from swiftmoe_lightning.modules.experts import Experts
from swiftmoe_lightning.modules.routing_ids import as_integers, check_recording, compact_ids, signed_ids
from swiftmoe_lightning.modules.routing_tap import RoutingTap


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the experts that every token is routed to.

    Forwards that activation checkpointing repeats are not recorded again. Compiled modules run eagerly inside.

    Args:
        model: with `MoE` blocks, or converted by `convert`.

    Yields:
        Name of each `Experts` module -> [T, K], filled when the context ends: the tokens of all forwards, in their
        order, in the smallest unsigned dtype that holds 0..E (its largest value is an assignment that was not made), on
        the layer's device. Each rank records its own tokens.

    Raises:
        ValueError: for a model without MoE layers, or with a layer whose router is not found or lets experts choose.
        TypeError: in the forward, for a router whose output has no ids.
        RuntimeError: inside another such context.
    """
    taps = _taps(model)
    routing: dict[str, Tensor] = {}
    try:
        with torch.compiler.set_stance("force_eager"):
            for tap in taps.values():
                tap.open(None)
            yield routing
    finally:
        recorded = {name: tap.close() for name, tap in taps.items()}
        # As bytes: hardly an operator takes unsigned integers of more on every device.
        routing |= {
            name: torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
            for name, parts in recorded.items()
            if parts
        }


@contextmanager
def replay_routing(model: nn.Module, routing: Mapping[str, Tensor]) -> Iterator[None]:
    """Route by a recording: the router's scores are the current ones, and so are weights and gradients.

    A layer's rows are taken in order, by any number of forwards. Forwards that activation checkpointing repeats choose
    as they did, also in a backward after the context. Popularity, capacity, auxiliary losses and the balancing bias see
    the replayed assignments; of those over a budget the lowest current scores go first. Compiled modules run eagerly
    inside.

    Args:
        model: with `MoE` blocks, or converted by `convert`.
        routing: what `record_routing` or `routing_from_array` gave for this rank's tokens; or [T, K] of any integer
            dtype for each layer, where a row of -1 is a token without a recording, which is routed live.

    Raises:
        ValueError: for a model without MoE layers, or a recording of other layers, tokens, experts or top-k.
        TypeError: for a recording of other numbers than integers, and, in the forward, for a router whose output has
            no ids.
        RuntimeError: inside another such context; in backward when the forward to repeat is not known.
    """
    taps = _taps(model)
    if taps.keys() != routing.keys():
        raise ValueError(
            f"the recording is of {len(routing)} layers, and the model has {len(taps)} MoE layers. Not recorded: "
            f"{sorted(taps.keys() - routing.keys())}; not in the model: {sorted(routing.keys() - taps.keys())}. Record "
            "and replay on the same module of the same model. (FAQ: routing-replay)"
        )
    for name, tap in taps.items():
        check_recording(name, routing[name], tap.num_experts)
    try:
        with torch.compiler.set_stance("force_eager"):
            for name, tap in taps.items():
                tap.open(routing[name])
            yield
            for tap in taps.values():
                tap.check_all_replayed()
    finally:
        for tap in taps.values():
            tap.close()


def routing_to_array(routing: Mapping[str, Tensor]) -> np.ndarray:
    """A recording in the layout of vLLM and SGLang.

    Args:
        routing: of `record_routing`.

    Returns:
        [T, L, K] int32, -1 for an assignment that was not made.

    Raises:
        ValueError: when layers differ in tokens or top-k, or there are none.
    """
    shapes = {name: list(ids_TK.shape) for name, ids_TK in routing.items()}
    if len({tuple(shape) for shape in shapes.values()}) != 1:
        raise ValueError(
            f"one array needs layers of the same [tokens, top_k], got {shapes}. Convert those that agree, each "
            "group by itself. (FAQ: routing-replay)"
        )
    layers = [signed_ids(ids_TK.cpu()) for ids_TK in routing.values()]
    array: np.ndarray = torch.stack(layers, 1).to(torch.int32).numpy()
    return array


def routing_from_array(array: np.ndarray | Tensor, model: nn.Module) -> dict[str, Tensor]:
    """A recording from the layout of vLLM and SGLang, for `replay_routing`.

    Args:
        array: [T, L, K] integers, L the model's MoE layers in its order. Rows of -1 are tokens without a recording.
        model: the module that is given to `replay_routing`.

    Returns:
        Name of each `Experts` module -> [T, K], as `record_routing` gives it, on the array's device.

    Raises:
        TypeError: for numbers that are no integers.
        ValueError: for another shape or number of layers, for ids that are no experts, and as `replay_routing`.
    """
    ids_TLK, taps = as_integers(array), _taps(model)
    if ids_TLK.shape[1] != len(taps):
        raise ValueError(
            f"recorded expert ids of shape {list(ids_TLK.shape)} are of {ids_TLK.shape[1]} layers, and the model has "
            f"{len(taps)} MoE layers: {list(taps)}. Leave out layers without experts: array[:, moe_layers]. "
            "(FAQ: routing-replay)"
        )
    for index, (name, tap) in enumerate(taps.items()):
        check_recording(name, ids_TLK[:, index], tap.num_experts)
    return {name: compact_ids(ids_TLK[:, index], tap.num_experts) for index, (name, tap) in enumerate(taps.items())}


def _taps(model: nn.Module) -> dict[str, RoutingTap]:
    """Name of each `Experts` -> its tap, which is not attached yet, or still is from a context before."""
    taps, without_router = {}, []
    for parent_name, parent in model.named_modules():
        for key, experts in parent.named_children():
            if not isinstance(experts, Experts):
                continue
            name = f"{parent_name}.{key}".lstrip(".")
            router = parent._modules.get("router") or parent._modules.get("gate")
            if router is None:
                without_router.append(name)
            else:
                taps[name] = experts.routing_tap or RoutingTap(name, experts, router)
    if without_router:
        raise ValueError(
            f"no router was found beside the experts {without_router}: its routing can be neither recorded nor "
            "replayed. Name the module that chooses experts `router` or `gate`. (FAQ: routing-replay)"
        )
    chosen_by_experts = [name for name, tap in taps.items() if isinstance(tap.router, ExpertChoiceRouter)]
    if chosen_by_experts:
        raise ValueError(
            f"in {chosen_by_experts} experts choose tokens (ExpertChoiceRouter), so a token has any number of experts "
            "and no top-k to record or replay. Take a router in which tokens choose experts. (FAQ: routing-replay)"
        )
    if not taps:
        raise ValueError(
            f"{type(model).__name__} has no MoE layers, so there is no routing to record or replay. Give a model with "
            "sml.MoE blocks, or convert() it first. (FAQ: routing-replay)"
        )
    if any(tap.is_open for tap in taps.values()):
        raise RuntimeError(
            "record_routing and replay_routing cannot be nested on one model. End the first before the second. "
            "(FAQ: routing-replay)"
        )
    return taps
