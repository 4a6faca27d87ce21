"""Makes the engine's `Placer`, which phase 3 of a step asks for placements, and its log messages. E experts."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping

from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.distributed import ExpertGroup
from swiftmoe_lightning.placement import LayerMemory, PlacementPolicy, Placer, make_policy

_log = logging.getLogger(__name__)


def make_placer(config: SwiftMoEConfig, group: ExpertGroup) -> Placer:
    """The placer of an engine's layers in this expert group. The first rank of all logs when it falls back."""

    def policy_of(num_experts: int) -> PlacementPolicy:
        slots_per_rank = config.resolve_slots_per_rank(num_experts, group.expert.size)
        return make_policy(config.placement, group.expert.size, slots_per_rank, group.ranks_per_node)

    logs = group.is_first
    placer = Placer(policy_of, skip_when_balanced=config.replace_every == "auto", report=_log.info if logs else None)
    if logs:
        # When the placer is freed, or else at exit: no hook of the frameworks runs at the end of every script.
        weakref.finalize(placer, _log_uniform_fallbacks, placer.layers)
    return placer


def _log_uniform_fallbacks(layers: Mapping[str, LayerMemory]) -> None:
    """Log one line for the whole run, if uniform replicas replaced most of a layer's placements."""
    mostly_uniform = {
        name: memory for name, memory in layers.items() if 2 * memory.num_fallbacks > memory.num_placements
    }
    if not mostly_uniform:
        return
    name_of_most = max(mostly_uniform, key=lambda name: mostly_uniform[name].num_fallbacks)
    _log.warning(
        "popularity moved too fast to follow: uniform replicas stood in for most placements by it in %d layer(s), most "
        "in %s, %d of %d times. For those placement='static' does as well. (FAQ: uniform-replicas)",
        len(mostly_uniform),
        name_of_most,
        mostly_uniform[name_of_most].num_fallbacks,
        mostly_uniform[name_of_most].num_placements,
    )
