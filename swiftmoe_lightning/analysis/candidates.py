"""The policies that a trace can be planned with, each with the capacity and the token split of its authors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from swiftmoe_lightning.analysis.baselines import EPLBPolicy, FlexMoEPolicy, LPTPolicy, ShadowingPolicy
from swiftmoe_lightning.config import PLACEMENTS
from swiftmoe_lightning.placement import PlacementPolicy, make_policy


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy and how it is run.

    Attributes:
        make: (world_size, slots_per_rank) -> the policy.
        split: its token split.
        capacity_per: what has a budget where there is a capacity: a "rank" or a "slot".
        is_oracle: whether a step is planned from the step itself, whatever the lag.
        moves_state: whether optimizer state lives beside the weights, so that a rank where an expert is new gets all of
            the expert's.
        label: one or two words that describe it in tables.
    """

    make: Callable[[int, int], PlacementPolicy]
    split: str = "uniform"
    capacity_per: str = "rank"
    is_oracle: bool = False
    moves_state: bool = False
    label: str


_OURS: Final = "pooled rank budget"
_PAPERS: Final = "slot budget"
_BASELINE: Final = "re-implementation"

CANDIDATES: Final[Mapping[str, Candidate]] = {
    **{
        name: Candidate(make=partial(make_policy, name), split="balanced", label=_OURS)
        for name in PLACEMENTS
        if name not in ("symi", "static")
    },
    **{
        name: Candidate(make=partial(make_policy, name), capacity_per="slot", label=_PAPERS)
        for name in ("symi", "static")
    },
    "static-pooled": Candidate(make=partial(make_policy, "static"), split="balanced", label="static, " + _OURS),
    **{
        f"flexmoe-{interval}": Candidate(
            make=partial(FlexMoEPolicy, interval=interval), capacity_per="slot", moves_state=True, label=_BASELINE
        )
        for interval in (10, 50, 100)
    },
    "eplb": Candidate(make=EPLBPolicy, label=_BASELINE),
    "lpt": Candidate(make=LPTPolicy, moves_state=True, label=_BASELINE),
    "shadowing": Candidate(make=ShadowingPolicy, is_oracle=True, label=_BASELINE),
    "oracle": Candidate(
        make=partial(make_policy, "packed"), split="balanced", is_oracle=True, label="packed, knowing the step"
    ),
}
