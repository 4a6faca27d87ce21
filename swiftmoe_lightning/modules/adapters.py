"""Low-rank adapters of experts: each expert has factors of its own, which are parameters of `Experts` like the rest.

The adapter of `down_proj` is `down_proj_lora_A [E, r, in]` and `down_proj_lora_B [E, out, r]`: rows x of an expert get
down_proj x + scale * B (A x). E experts, s slots, r rank.
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
        scales: name of an adapted parameter -> factor of its adapter's output.
        enabled: False computes as if there were none.
    """

    scales: dict[str, float] = field(default_factory=dict)
    enabled: bool = True

    def scaled(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` [s, ...] with the scales in the B factors; without factors where adapters are not enabled."""
        scaled = {name: w for name, w in weights.items() if self.enabled or not is_factor(name)}
        for name, scale in self.scales.items():
            if self.enabled:
                scaled[f"{name}_lora_B"] = scaled[f"{name}_lora_B"] * scale
        return scaled
