"""Low-rank adapters of experts: each expert has factors of its own, which are parameters of `Experts` like the rest.

The adapter of `down_proj` is `down_proj_lora_A [E, r, in]` and `down_proj_lora_B [E, out, r]`: rows x of an expert get
down_proj x + scale * B (A x). Of several adapters at most one is computed, and all but the first have their own name in
those of their factors: `down_proj_NAME_lora_A`. E experts, s slots, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from swiftmoe_lightning.ops import is_factor


@dataclass
class Adapters:
    """The adapters of one `Experts`.

    Attributes:
        scales: name of an adapter -> name of a parameter that it adapts -> factor of its output.
        active: the adapter that is computed; None for none.
        enabled: False computes as if there were none.
    """

    scales: dict[str, dict[str, float]] = field(default_factory=dict)
    active: str | None = None
    enabled: bool = True

    def stem(self, adapter: str, parameter: str) -> str:
        """What the names of an adapter's factors of a parameter begin with."""
        return parameter if adapter == next(iter(self.scales)) else f"{parameter}_{adapter}"

    def scaled(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` [s, ...] with the active adapter's factors alone, and the scales in its B's."""
        scaled = {name: w for name, w in weights.items() if not is_factor(name)}
        if self.enabled and self.active is not None:
            for parameter, scale in self.scales[self.active].items():
                stem = self.stem(self.active, parameter)
                scaled[f"{parameter}_lora_A"] = weights[f"{stem}_lora_A"]
                scaled[f"{parameter}_lora_B"] = weights[f"{stem}_lora_B"] * scale
        return scaled
