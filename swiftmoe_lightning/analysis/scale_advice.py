"""Which group size to take, and why. W ranks, g of an expert group, s slots of a rank."""

from __future__ import annotations

from typing import Any, Final

from swiftmoe_lightning.analysis.cluster import Cluster, Workload
from swiftmoe_lightning.analysis.model_sizes import ModelSizes
from swiftmoe_lightning.analysis.report.page_text import bytes_text, seconds_text
from swiftmoe_lightning.analysis.scale import SPARE, GroupCost
from swiftmoe_lightning.config import SwiftMoEConfig

# Larger groups are costed, but never advised: the host's planning, which grows with g, is not in the seconds.
_ADVISED_LIMIT: Final = 128


def candidate_sizes(cluster: Cluster) -> list[int]:
    """Group sizes to compare: those up to 128 whose groups and nodes nest; the default; and all ranks as one group.

    Args:
        cluster: the ranks.
    """
    num_ranks, node = cluster.num_ranks, cluster.ranks_per_node
    nested = {
        g
        for g in range(1, min(num_ranks, _ADVISED_LIMIT) + 1)
        if num_ranks % g == 0 and (node % g == 0 or g % node == 0)
    }
    return sorted(nested | {SwiftMoEConfig().resolve_expert_parallel_size(num_ranks), num_ranks})


class Advice:
    """Group sizes compared on one number of ranks, and the one to take.

    Attributes:
        costs: one for each candidate, smallest group first.
        default: the one that a run takes by itself.
        best: of those that fit, up to 128 ranks, the one with the least time on the wire; where none fits, the one that
            needs the least memory.
    """

    def __init__(self, model: ModelSizes, cluster: Cluster, workload: Workload) -> None:
        self.costs = [GroupCost(model, cluster, workload, g) for g in candidate_sizes(cluster)]
        default = SwiftMoEConfig().resolve_expert_parallel_size(cluster.num_ranks)
        (self.default,) = (cost for cost in self.costs if cost.group_size == default)
        small = [cost for cost in self.costs if cost.group_size <= _ADVISED_LIMIT]
        fitting = [cost for cost in small if cost.fits]
        self.best = min(fitting or small, key=lambda cost: cost.step_seconds if fitting else cost.resident_bytes)

    @property
    def main_costs(self) -> list[GroupCost]:
        """The best, the default, and one group of all ranks, smallest group first."""
        wanted = {self.best.group_size, self.default.group_size, self.best.cluster.num_ranks}
        return [cost for cost in self.costs if cost.group_size in wanted]

    @property
    def settings(self) -> dict[str, Any]:
        """Options of `SwiftMoEStrategy`."""
        return {
            "expert_parallel_size": self.best.group_size,
            "slots_per_rank": self.best.slots_per_rank,
            "dense": self.best.dense,
            "param_dtype": self.best.workload.param_dtype,
            "reduce_dtype": self.best.workload.reduce_dtype,
            **({} if self.best.workload.token_dtype is None else {"token_dtype": self.best.workload.token_dtype}),
        }

    def sentences(self) -> list[str]:
        """What to use, and why."""
        best = self.best
        options = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        said = [f"{best.cluster.num_ranks:,} ranks: {options}.".replace("'", '"')]
        said += [self._why_the_group(), self._why_dense()] if best.fits else [self._why_nothing_fits()]
        if best.fullest > 1.05:
            said.append(
                f"Rows run out: the rank that owns most has {best.fullest:.2g} times the mean, which seconds and "
                "memory count."
            )
        return said

    def _why_the_group(self) -> str:
        best, default = self.best, self.default
        why = f"Of the groups of up to {_ADVISED_LIMIT} ranks that fit, these spend the least time on the wire: "
        why += f"{seconds_text(best.step_seconds)} a step"
        if best is default:
            return why + "; it is also the default."
        if default.fits:
            return why + f", against {seconds_text(default.step_seconds)} with the default of {default.group_size}."
        return why + f"; the default of {default.group_size} needs {bytes_text(default.resident_bytes)}."

    def _why_dense(self) -> str:
        best = self.best
        size = bytes_text(best.dense_bytes(best.dense))
        whole = f"The dense part takes {bytes_text(best.dense_bytes('ddp'))} with its optimizer state"
        if best.dense == "ddp":
            return f"{whole}, and fits whole on each rank."
        if best.dense == "hsdp":
            return f"{whole}; cut over a group {size}, and it is gathered within the group."
        return f"{whole}; cut over all ranks {size}."

    def _why_nothing_fits(self) -> str:
        best = self.best
        parts = (
            (best.slot_bytes, "slots, which take less in larger groups"),
            (best.state_bytes, "experts' state, which takes less with more ranks, a narrower dtype or offloading"),
            (best.buffer_bytes, "buffers, which take less with one micro-batch a step, or fewer tokens"),
            (best.dense_bytes(best.dense), "the dense part, which takes less with more ranks"),
        )
        largest, remedy = max(parts)
        return (
            f"No group fits: this one needs least, {bytes_text(best.resident_bytes)} of a GPU's "
            f"{bytes_text(best.cluster.gpu_bytes)}, {100 * SPARE:.0f} % of which are kept for activations. Most of it "
            f"is {bytes_text(largest)} of {remedy}."
        )
