"""W ranks in one process: a model whose experts drop what W real ranks would drop, placed step by step as there.

The ranks' batches lie one after the other. Router, aux loss and gradients are those of the whole batch, which is what
W ranks compute together; so only the choice of what is dropped needs to be emulated. `tests/benchmarks/convergence`
holds it equal to real ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.convergence.systems import System, keep_as_deepspeed, keep_within_budgets, weigh_as_deepspeed
from swiftmoe_lightning.modules import Experts, MoE
from swiftmoe_lightning.modules.forward import ExpertsOutput, StartedForward
from swiftmoe_lightning.placement import ExpertLoad, Placement, Placer


class EmulatedCluster:
    """The ranks that a model's MoE layers are spread over, in imagination.

    Args:
        model: its `Experts` are replaced by emulated ones, which have the same parameters.
        system: how experts are placed and what is dropped.
        num_ranks: W.
        slots_per_rank: s.
        factor: capacity factor; None drops nothing.
        seed: of random drops.

    Attributes:
        placements: layer name -> where its experts are.
        loads: layer name -> the load of the last forward with gradients.
    """

    def __init__(
        self, model: nn.Module, system: System, num_ranks: int, slots_per_rank: int, factor: float | None, seed: int
    ) -> None:
        self.system, self.factor = system, None if system.capacity == "none" else factor
        self._generator = torch.Generator().manual_seed(seed)
        self._blocks = {name: block for name, block in model.named_modules() if isinstance(block, MoE)}
        for name, block in self._blocks.items():
            block.experts = EmulatedExperts.of(block.experts, self, name)
        self._placer = Placer(lambda _: system.candidate.make(num_ranks, slots_per_rank))
        sizes = {name: block.experts.num_experts for name, block in self._blocks.items()}
        self.placements: dict[str, Placement] = self._placer.planned(sizes)
        self.loads: dict[str, ExpertLoad] = {}

    def after_update(self) -> None:
        """Place the experts for the next step, and move the routers' biases."""
        for name, block in self._blocks.items():
            block.router.update_bias(self.loads[name].popularity_E)
        self.placements = self._placer.next_placements(self.loads)

    def keep(self, name: str, expert_ids_TK: Tensor, scores_TK: Tensor) -> Tensor:
        """[T, K] bool: which assignments are computed; leaves the load in `loads`.

        Args:
            name: the layer's.
            expert_ids_TK: [T, K] int64, all ranks' tokens, one rank's after the other's.
            scores_TK: [T, K] floating, the router's weights.
        """
        placement = self.placements[name]
        ids_WTK = expert_ids_TK.unflatten(0, (placement.world_size, -1))
        if self.system.capacity == "deepspeed" and self.factor is not None:
            random_WTE = self.draw((*ids_WTK.shape[:2], placement.num_experts))
            kept_WTK, self.loads[name] = keep_as_deepspeed(ids_WTK, placement, self.factor, random_WTE)
        else:
            scores_WTK = scores_TK.detach().view(ids_WTK.shape)
            kept_WTK, self.loads[name] = keep_within_budgets(
                ids_WTK, scores_WTK, placement, self.system.candidate, self.factor
            )
        return kept_WTK.view(expert_ids_TK.shape)

    def weigh(self, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """[T, K] weights of the assignments, once it is known which are kept; differentiable.

        Args:
            weights_TK: [T, K] floating, the router's.
            kept_TK: what `keep` returned.
        """
        return weigh_as_deepspeed(weights_TK, kept_TK) if self.system.capacity == "deepspeed" else weights_TK

    def draw(self, shape: tuple[int, int, int]) -> Tensor:
        """[W, T, E] uniform in 0..1, which says what DeepSpeed's gates keep."""
        return torch.rand(shape, generator=self._generator)


class EmulatedExperts(Experts):
    """Experts on one device that compute what their cluster keeps. Forwards without gradients compute everything."""

    _cluster: EmulatedCluster
    _name: str

    @classmethod
    def of(cls, experts: Experts, cluster: EmulatedCluster, name: str) -> EmulatedExperts:
        """Experts with the parameters of others.

        Args:
            experts: whose parameters they have.
            cluster: which decides what is kept.
            name: of the layer.
        """
        emulated = cls.from_parameters(experts.expert_parameters(), experts.activation)
        # Past Module's own, which would take the cluster for a part of the model.
        object.__setattr__(emulated, "_cluster", cluster)
        emulated._name = name
        return emulated

    def start(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, scores_finite: Tensor | None = None
    ) -> StartedForward:
        """As `Experts.start`, for the batch of all ranks."""
        if not torch.is_grad_enabled():
            return super().start(x_TD, expert_ids_TK, weights_TK, scores_finite)
        kept_TK = self._cluster.keep(self._name, expert_ids_TK, weights_TK)
        ids_TK = torch.where(kept_TK, expert_ids_TK, self.num_experts)
        return super().start(x_TD, ids_TK, self._cluster.weigh(weights_TK, kept_TK), scores_finite)

    def finish(self, started: StartedForward) -> ExpertsOutput:
        """As `Experts.finish`."""
        out = super().finish(started)
        if not torch.is_grad_enabled():
            return out
        # What is dropped was chosen all the same: the balancing loss and the popularity count it.
        popularity_E = torch.from_numpy(self._cluster.loads[self._name].popularity_E)
        return ExpertsOutput(out.hidden_TD, popularity_E, 1, out.recomputes)
