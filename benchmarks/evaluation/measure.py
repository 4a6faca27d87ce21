"""One rank's forwards of a prompt through layers of experts, evaluated in both ways.

T tokens, D model dim, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common.across_ranks import pin_to_core, slowest, total
from benchmarks.common.command_line import setting
from benchmarks.common.interleaved import interleaved, seconds_of
from benchmarks.common.spread import paired_ratio, spread
from swiftmoe_lightning import Experts, SwiftMoEConfig, SwiftMoEEngine

WAYS: Final = ("sharded", "placed")
ROUTINGS: Final = ("even", "zipf", "hot")
_WARM_UP: Final = 4


@dataclass(frozen=True)
class Sizes:
    """A stack of layers of experts, and a rank's prompt."""

    ranks: int = setting(2, "gloo ranks, one thread each")
    layers: int = setting(4, "layers of experts")
    dim: int = setting(256, "model dim")
    hidden_dim: int = setting(512, "hidden dim of an expert")
    experts: int = setting(16, "experts of a layer")
    top_k: int = setting(2, "experts of a token")
    tokens: int = setting(32, "tokens of a rank's prompt")
    pairs: int = setting(20, "of a ratio: two measurements of each way")


class Stack(nn.Module):
    """Layers of experts, each added to its input, with routes that are given."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        make = lambda: Experts(sizes.experts, sizes.dim, sizes.hidden_dim)  # noqa: E731
        self.layers = nn.ModuleList([make() for _ in range(sizes.layers)])

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = x_TD + layer(x_TD, ids_TK, weights_TK)
        return x_TD


def prompt(sizes: Sizes, routing: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's tokens, and their routes: experts drawn evenly, by Zipf's law, or the first expert first by all."""
    generator = torch.Generator().manual_seed(rank)
    popularity_E = torch.ones(sizes.experts)
    if routing == "zipf":
        popularity_E /= torch.arange(1, sizes.experts + 1)
    if routing == "hot":
        popularity_E[0] = 1e9
    ids_TK = popularity_E.expand(sizes.tokens, -1).multinomial(sizes.top_k, generator=generator)
    x_TD = torch.randn(sizes.tokens, sizes.dim, generator=generator)
    return x_TD, ids_TK, torch.full(ids_TK.shape, 1 / sizes.top_k)


def measure(sizes: Sizes) -> dict[str, Any]:
    """Both ways by routing. A collective; every rank returns the same."""
    pin_to_core()
    stacks, engines = {}, {}
    for way in WAYS:
        torch.manual_seed(0)
        stacks[way] = Stack(sizes).eval()
        engines[way] = SwiftMoEEngine(stacks[way], SwiftMoEConfig(evaluate=way))
        # The slots are filled, as after a step of training.
        stacks[way](*prompt(sizes, "even", dist.get_rank()))
        engines[way].wait_for_weights()
    with torch.no_grad():
        routes = prompt(sizes, "even", dist.get_rank())
        first = {way: slowest([seconds_of(lambda w=way: stacks[w](*routes))])[0] for way in WAYS}
        results: dict[str, Any] = {
            "first_forward_ms": {way: 1e3 * seconds for way, seconds in first.items()},
            "recut_mib": total([engines["sharded"].traffic["recut"] / 2**20])[0],
            "weights_mib": {way: slowest([_weight_bytes(engines[way]) / 2**20])[0] for way in WAYS},
        }
        for routing in ROUTINGS:
            results[routing] = _compare(stacks, engines, prompt(sizes, routing, dist.get_rank()), sizes)
    return results


def _compare(
    stacks: Mapping[str, nn.Module],
    engines: Mapping[str, SwiftMoEEngine],
    routes: tuple[Tensor, Tensor, Tensor],
    sizes: Sizes,
) -> dict[str, Any]:
    outputs, sent = {}, {}
    for way in WAYS:
        before = sum(engines[way].group.token_bytes.values())
        outputs[way] = stacks[way](*routes)
        sent[way] = total([(sum(engines[way].group.token_bytes.values()) - before) / 1024])[0]
    torch.testing.assert_close(outputs["sharded"], outputs["placed"], rtol=1e-4, atol=1e-5)

    def forward(way: str) -> float:
        dist.barrier()
        return seconds_of(lambda: stacks[way](*routes))

    ours, theirs = interleaved(lambda: forward("sharded"), lambda: forward("placed"), sizes.pairs, _WARM_UP)
    ours, theirs = slowest(ours), slowest(theirs)
    return {
        "ratio": paired_ratio(ours, theirs),
        "ms": {way: spread([1e3 * s for s in seconds]) for way, seconds in zip(WAYS, (ours, theirs), strict=True)},
        "sent_kib": sent,
    }


def _weight_bytes(engine: SwiftMoEEngine) -> int:
    """Memory of the experts' weights that this rank computes with."""
    held = 0
    for layer in engine.layers:
        slots = layer.slots
        tensors = [*slots.weights.values(), *(slots.pieces.weights.values() if slots.pieces is not None else ())]
        held += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return held
