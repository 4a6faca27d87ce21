"""How much of each expert's load every one of its hosts takes. E experts, D hosted (rank, expert) pairs."""

from __future__ import annotations

import numpy as np

from swiftmoe_lightning.placement.placement import Placement


def share_tokens(load_E: np.ndarray, placement: Placement) -> np.ndarray:
    """[D] int64: an expert's load cut in equal parts a slot, at whole tokens; each expert's parts add up to its load.

    load_E: [E] int64, token-choices.
    """
    order_D = placement.by_expert_D
    expert_D, slots_D = placement.pair_expert_D[order_D], placement.pair_slots_D[order_D]
    after_D = np.cumsum(slots_D)
    first_E = np.searchsorted(expert_D, np.arange(placement.num_experts))
    before_E = after_D[first_E] - slots_D[first_E]
    after_D -= before_E[expert_D]
    load_D, replicas_D = load_E[expert_D], placement.replica_counts_E[expert_D]
    share_D = np.empty_like(after_D)
    share_D[order_D] = load_D * after_D // replicas_D - load_D * (after_D - slots_D) // replicas_D
    return share_D
