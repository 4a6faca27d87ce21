"""Synthetic traces: eight ways in which popularity is uneven or moves, each a formula with fixed parameters.

A scenario gives the n-th expert a share of step u's assignments. Every layer numbers its experts in an order of its
own, and every source rank draws its assignments by these shares; orders and draws follow from the seed.

U steps, W source ranks, L layers, E experts, K top-k. An assignment is one token's choice of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from swiftmoe_lightning.analysis.trace import Trace, check_bytes
from swiftmoe_lightning.config import SwiftMoEConfig, check_choice, check_whole

# The n-th of E experts has a share in proportion to 1 / n ** ZIPF_EXPONENT.
ZIPF_EXPONENT: Final = 1.0
# Share of the tokens that choose the hot expert, and the one that a burst is about. They are the expert's share of the
# assignments times K.
HOT_TOKENS: Final = 0.5
BURST_TOKENS: Final = 0.8
# Steps until the next expert is the hot one.
ROTATION_STEPS: Final = 20
# A period ends with a burst of so many steps.
BURST_PERIOD: Final = 10
BURST_STEPS: Final = 1
# Steps of one domain before the other comes.
SWITCH_STEPS: Final = 4
# One expert of so many stays; the others fade with this time constant, in steps, but never quite to nothing.
DYING_EXPERTS_PER_SURVIVOR: Final = 8
DYING_STEPS: Final = 50.0
_COLDEST: Final = 1e-6
# Share of the run after which experts relax towards equal shares, and the time constant in steps.
RELAXATION_START: Final = 0.5
RELAXATION_STEPS: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class ScenarioOptions:
    """The run that a scenario stands for.

    Attributes:
        seed: of the experts' orders and of the draws.
        num_steps: U.
        num_ranks: W.
        num_layers: L.
        num_experts: E.
        top_k: K, experts of a token.
        tokens_per_rank: tokens of a rank and step.

    Raises:
        ValueError: for a value out of range, or more than a trace may hold.
    """

    seed: int = 0
    num_steps: int = 300
    num_ranks: int = 16
    num_layers: int = 4
    num_experts: int = 64
    top_k: int = 2
    tokens_per_rank: int = 4096

    def __post_init__(self) -> None:
        check_whole(0, seed=self.seed)
        check_whole(num_steps=self.num_steps, num_ranks=self.num_ranks, num_layers=self.num_layers)
        check_whole(2, num_experts=self.num_experts)
        check_whole(top_k=self.top_k, tokens_per_rank=self.tokens_per_rank)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts ({self.num_experts}), got {self.top_k}. Lower it.")
        check_bytes("a scenario", 8 * self.num_steps * self.num_ranks * self.num_layers * self.num_experts)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How popularity is spread over the experts, and how it moves.

    Attributes:
        about: a sentence.
        shares: options -> [U, E] the n-th expert's share of each step's assignments; rows add up to 1.
    """

    about: str
    shares: Callable[[ScenarioOptions], np.ndarray]


def make_scenario(name: str, options: ScenarioOptions | None = None) -> Trace:
    """A scenario as a trace. Equal options give equal traces.

    Args:
        name: of `SCENARIOS`.
        options: the run's sizes and its seed; None takes the defaults.

    Returns:
        The trace, every rank with tokens_per_rank * K assignments in each step and layer. Its metadata has the ranks,
        and as many slots as training takes by default. A rank's draws are independent of each other, so an expert with
        a share near 1 / K may have a few more of them than the rank has tokens.

    Raises:
        ValueError: for an unknown name.
    """
    options = options or ScenarioOptions()
    share_ULE = scenario_shares(name, options)
    size = (options.num_steps, options.num_ranks, options.num_layers)
    counts_UWLE = _generator(options.seed, 1).multinomial(
        options.tokens_per_rank * options.top_k, share_ULE[:, None], size=size
    )
    slots = SwiftMoEConfig().resolve_slots_per_rank(options.num_experts, options.num_ranks)
    metadata = {
        "scenario": name,
        "seed": options.seed,
        "world_size": options.num_ranks,
        "slots_per_rank": slots,
    }
    return Trace(counts_UWLE, metadata=metadata)


def scenario_shares(name: str, options: ScenarioOptions) -> np.ndarray:
    """The path of popularity that the counts of `make_scenario` are drawn about.

    Args:
        name: of `SCENARIOS`.
        options: the run's sizes and its seed.

    Returns:
        [U, L, E] shares of a layer's assignments; over E they add up to 1, and none is above 1 / K.

    Raises:
        ValueError: for an unknown name.
    """
    check_choice("scenario", name, tuple(SCENARIOS))
    share_UE = _capped(SCENARIOS[name].shares(options), 1 / options.top_k)
    number_LE = np.tile(np.arange(options.num_experts), (options.num_layers, 1))
    return share_UE[:, _generator(options.seed, 0).permuted(number_LE, axis=1)]


def _generator(seed: int, stream: int) -> np.random.Generator:
    # `default_rng` may one day be another generator.
    return np.random.Generator(np.random.PCG64([seed, stream]))


def _capped(share_UE: np.ndarray, most: float) -> np.ndarray:
    """A token chooses an expert once at the most: what a share has above `most` goes to the others, in proportion."""
    is_full_UE = np.zeros(share_UE.shape, dtype=bool)
    while (is_over_UE := share_UE > most + 1e-12).any():
        is_full_UE |= is_over_UE
        free_UE = np.where(is_full_UE, 0.0, share_UE)
        left_U = 1 - most * is_full_UE.sum(1)
        share_UE = np.where(is_full_UE, most, free_UE * (left_U / free_UE.sum(1))[:, None])
    return share_UE


def _even(options: ScenarioOptions) -> np.ndarray:
    return np.full((options.num_steps, options.num_experts), 1 / options.num_experts)


def _zipf(options: ScenarioOptions) -> np.ndarray:
    weight_E = np.arange(1, options.num_experts + 1) ** -ZIPF_EXPONENT
    return np.tile(weight_E / weight_E.sum(), (options.num_steps, 1))


def _hot(options: ScenarioOptions) -> np.ndarray:
    return _with_one(np.zeros(options.num_steps, dtype=np.int64), HOT_TOKENS, options)


def _rotating(options: ScenarioOptions) -> np.ndarray:
    return _with_one(np.arange(options.num_steps) // ROTATION_STEPS, HOT_TOKENS, options)


def _burst(options: ScenarioOptions) -> np.ndarray:
    period_U, step_U = np.divmod(np.arange(options.num_steps), BURST_PERIOD)
    is_burst_U = step_U >= BURST_PERIOD - BURST_STEPS
    return np.where(is_burst_U[:, None], _with_one(period_U, BURST_TOKENS, options), _even(options))


def _switch(options: ScenarioOptions) -> np.ndarray:
    is_second_U = np.arange(options.num_steps) // SWITCH_STEPS % 2 == 1
    first_UE = _zipf(options)
    return np.where(is_second_U[:, None], first_UE[:, ::-1], first_UE)


def _dying(options: ScenarioOptions) -> np.ndarray:
    num_survivors = -(-options.num_experts // DYING_EXPERTS_PER_SURVIVOR)
    fading_U = np.maximum(np.exp(-np.arange(options.num_steps) / DYING_STEPS), _COLDEST)
    weight_UE = np.where(np.arange(options.num_experts) < num_survivors, 1.0, fading_U[:, None])
    return weight_UE / weight_UE.sum(1, keepdims=True)


def _relaxing(options: ScenarioOptions) -> np.ndarray:
    late_U = np.maximum(np.arange(options.num_steps) - RELAXATION_START * options.num_steps, 0)
    skew_U1 = np.exp(-late_U / RELAXATION_STEPS)[:, None]
    return skew_U1 * _zipf(options) + (1 - skew_U1) * _even(options)


def _with_one(expert_U: np.ndarray, tokens: float, options: ScenarioOptions) -> np.ndarray:
    """[U, E]: a share `tokens` of each step's tokens choose this expert, counted on from 0 after the last."""
    num_experts = options.num_experts
    # Where every token has many experts, equal shares may be larger.
    share = max(tokens / options.top_k, 1 / num_experts)
    is_it_UE = (expert_U % num_experts)[:, None] == np.arange(num_experts)
    return np.where(is_it_UE, share, (1 - share) / (num_experts - 1))


SCENARIOS: Final[Mapping[str, Scenario]] = MappingProxyType(
    {
        "even": Scenario(about="all experts have equal shares.", shares=_even),
        "zipf": Scenario(
            about=f"the n-th expert's share goes as 1 / n^{ZIPF_EXPONENT:g}, in every step.",
            shares=_zipf,
        ),
        "hot": Scenario(
            about=f"{HOT_TOKENS:.0%} of the tokens choose one expert, always the same; the others have equal shares.",
            shares=_hot,
        ),
        "rotating": Scenario(
            about=f"as hot, but every {ROTATION_STEPS} steps the next expert is the hot one.",
            shares=_rotating,
        ),
        "burst": Scenario(
            about=f"equal shares, but in {BURST_STEPS} of {BURST_PERIOD} steps {BURST_TOKENS:.0%} of the tokens "
            "choose one expert, each time the next.",
            shares=_burst,
        ),
        "switch": Scenario(
            about=f"as zipf, but every {SWITCH_STEPS} steps the order turns round: the most popular expert becomes the "
            "least popular one.",
            shares=_switch,
        ),
        "dying": Scenario(
            about=f"all but one in {DYING_EXPERTS_PER_SURVIVOR} experts fade from equal shares, as "
            f"exp(-step / {DYING_STEPS:g}).",
            shares=_dying,
        ),
        "relaxing": Scenario(
            about=f"as zipf for {RELAXATION_START:.0%} of the run; from then on the skew fades with a time constant of "
            f"{RELAXATION_STEPS:g} steps.",
            shares=_relaxing,
        ),
    }
)
