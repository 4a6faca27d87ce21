"""Phase 3 of a step: where every layer's experts go next. E experts."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Mapping

from swiftmoe_lightning.comms import ExpertGroup
from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.engine.tracking import TrackedLayer
from swiftmoe_lightning.placement import Placement, Placer, make_policy

_log = logging.getLogger(__name__)


class Placers:
    """One `Placer` for all layers of the same number of experts."""

    def __init__(self, config: SwiftMoEConfig, group: ExpertGroup) -> None:
        self._config, self._group = config, group
        self._placers: dict[int, Placer] = {}
        if group.rank == 0:
            # When the engine is dropped, or else at exit: no host has one end of a run that all of them reach.
            weakref.finalize(self, _say_how_often_guarded, self._placers)

    def of(self, num_experts: int) -> Placer:
        """The placer of layers of E experts."""
        if num_experts not in self._placers:
            config, group = self._config, self._group
            slots_per_rank = config.resolve_slots_per_rank(num_experts, group.world_size)
            self._placers[num_experts] = Placer(
                make_policy(config.placement, group.world_size, slots_per_rank, group.ranks_per_node),
                num_experts,
                decay=config.popularity_decay,
                keeps_even=config.replace_every == "auto",
                report=_log.info if group.rank == 0 else None,
            )
        return self._placers[num_experts]

    def next_placements(self, tracked: list[TrackedLayer]) -> dict[int, Placement]:
        """Layer index -> next placement, for layers whose step has been closed. No communication."""
        by_size: dict[int, list[TrackedLayer]] = defaultdict(list)
        for t in tracked:
            by_size[t.experts.num_experts].append(t)
        placements: dict[int, Placement] = {}
        for num_experts, layers in by_size.items():
            found = self.of(num_experts).next_placements({t.name: t.take_observation() for t in layers})
            placements |= {t.index: found[t.name] for t in layers}
        return placements


def _say_how_often_guarded(placers: Mapping[int, Placer]) -> None:
    """One line for the whole run, if uniform replicas ever stood in for a policy's plan."""
    counts = {name: count for placer in placers.values() for name, count in placer.guard_counts().items()}
    if not counts:
        return
    most = max(counts, key=lambda name: counts[name][0])
    num_overruled, num_guarded = counts[most]
    _log.warning(
        "popularity moved too fast to follow now and then: uniform replicas stood in for placements by it in %d "
        "layer(s), most in %s, %d of %d times. If that is most of them, try popularity_decay=0.9.",
        len(counts),
        most,
        num_overruled,
        num_guarded,
    )
