"""The MoE block: router, experts, shared experts. T tokens, D model dim, F hidden dim, E experts, K top-k."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swiftmoe_lightning.config import check_coefficient, check_whole
from swiftmoe_lightning.distributed import phase
from swiftmoe_lightning.modules.experts import Experts
from swiftmoe_lightning.modules.forward import ExpertsOutput
from swiftmoe_lightning.modules.real_tokens import RealTokens
from swiftmoe_lightning.modules.router import RouterOutput, TopKRouter
from swiftmoe_lightning.modules.router_losses import RouterLosses
from swiftmoe_lightning.ops import activate, all_finite
from swiftmoe_lightning.placement import Capacity


class MoE(nn.Module):
    """Mixture-of-Experts feed-forward: [..., dim] -> [..., dim].

    Args:
        dim: D.
        hidden_dim: the inner width F of each expert.
        num_experts: E.
        top_k: K, how many experts each token chooses.
        activation: "swiglu", "gelu" or "relu2" (squared ReLU).
        router: one of the routers, or a module of yours, [T, D] -> `RouterOutput`; None builds `TopKRouter(dim,
            num_experts, top_k)`.
        capacity_factor: None computes every assignment (dropless). Otherwise a budget of assignments, this many times
            the mean load; over budget the lowest router scores go first, and a dropped assignment adds zero.
        capacity_per: "rank", one budget for each rank, pooled over its slots, or "slot", the paper's budget for each
            slot.
        num_shared_experts: experts that every token goes through, as one dense feed-forward of F * num_shared_experts.
        aux_loss_coef: weight of the load-balancing loss in `auxiliary_loss(module)`.
        z_loss_coef: weight of the z-loss there.
        bias: give the routed experts biases.
        device: of all parameters that are made here.
        dtype: of all parameters that are made here.

    Raises:
        ValueError: for sizes below 1, top_k outside 1..E, capacity_factor <= 0, negative coefficients, or an unknown
            activation or capacity_per.
    """

    def __init__(  # noqa: PLR0913 - public options
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "swiglu",
        router: nn.Module | None = None,
        capacity_factor: float | None = None,
        capacity_per: str = "rank",
        num_shared_experts: int = 0,
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole(0, num_shared_experts=num_shared_experts)
        check_coefficient(aux_loss_coef=aux_loss_coef, z_loss_coef=z_loss_coef)
        self.dim, self.top_k = dim, top_k
        self.aux_loss_coef, self.z_loss_coef = aux_loss_coef, z_loss_coef
        # Made even without a factor, so that an unknown capacity_per is an error in any case.
        limit = Capacity(1.0 if capacity_factor is None else capacity_factor, capacity_per)
        self.experts = Experts(
            num_experts,
            dim,
            hidden_dim,
            activation=activation,
            bias=bias,
            capacity=None if capacity_factor is None else limit,
            device=device,
            dtype=dtype,
        )
        self.router = router or TopKRouter(dim, num_experts, top_k, device=device, dtype=dtype)
        self.shared: nn.Module | None = None
        if num_shared_experts:
            self.shared = DenseMLP(dim, hidden_dim * num_shared_experts, activation, device, dtype)
        self.router_losses = RouterLosses()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        cluster_ids: Tensor | None = None,
    ) -> Tensor:
        """[..., D] -> [..., D].

        Args:
            x: [..., D].
            mask: [...] bool, true for a token, false for padding. Padding is left out from the router on: it is not
                counted, takes no capacity and is in no loss, and its output is zero, also of shared experts. Waits for
                the GPU once, for the number of tokens.
            token_ids: [...] int, which go to the router as its second argument, [T]; `HashRouter` needs them.
            cluster_ids: int, of each sequence, with the shape of x without its last two dims; or of each token, where a
                row of x has several sequences. They go to the router as `cluster_ids_T`, [T]; `ClusteredRouter` needs
                them.

        Raises:
            ValueError: for another last dim, or a mask, token_ids or cluster_ids of another shape than that of the
                tokens or sequences.
            TypeError: for a mask that is not bool.
            FloatingPointError: on every rank, for non-finite router scores. (On a single GPU without a capacity, to
                avoid waiting for it, only when loads are next read.)
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"MoE(dim={self.dim}) got an input of shape {list(x.shape)}: its last dim must be dim.")
        tokens = RealTokens(x, mask, token_ids, cluster_ids)
        x_TD = tokens.x_TD
        with phase("route"):
            routed: RouterOutput = self.router(x_TD, *tokens.ids, **tokens.clusters)
            finite = all_finite(routed.logits_TE)
        started = self.experts.start(x_TD, routed.expert_ids_TK, routed.weights_TK, finite)
        # While the ranks' counts travel.
        shared_TD = None if self.shared is None else self.shared(x_TD)
        result = self.experts.finish(started)
        loss = self._router_loss(routed, result)
        out_TD = self.router_losses.attach(loss, result.hidden_TD, result.recomputes)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        return tokens.put_back(out_TD)

    def _router_loss(self, routed: RouterOutput, result: ExpertsOutput) -> Tensor | None:
        """The block's weighted router losses, []; None without coefficients, or in evaluation.

        Training without grad mode counts: it is the first run of reentrant activation checkpointing.
        """
        if not (torch.is_grad_enabled() or self.training) or not (self.aux_loss_coef or self.z_loss_coef):
            return None
        loss = routed.logits_TE.new_zeros(())
        if self.aux_loss_coef:
            balance = routed.load_balancing_loss(result.popularity_E, result.num_data_ranks)
            loss = loss + self.aux_loss_coef * balance
        if self.z_loss_coef:
            num_tokens = result.popularity_E.sum() / routed.experts_per_token
            loss = loss + self.z_loss_coef * routed.z_loss(num_tokens, result.num_data_ranks)
        return loss


class DenseMLP(nn.Module):
    """A dense feed-forward with the experts' activation, for the shared experts, which every token goes through.

    Args:
        dim: D.
        hidden_dim: the inner width, of all shared experts together.
        activation: as of `MoE`.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        rows = 2 * hidden_dim if activation == "swiglu" else hidden_dim
        self.up_proj = nn.Linear(dim, rows, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden_TF = activate(self.up_proj(x.reshape(-1, x.shape[-1])), self.activation)
        out_TD: Tensor = self.down_proj(hidden_TF)
        return out_TD.reshape(x.shape)


def auxiliary_loss(module: nn.Module) -> Tensor:
    """The sum of all MoE blocks' weighted router losses, over their forwards since it was last read.

    Add it to the task loss. A block that is called twice counts twice.

    Args:
        module: the whole model, or any part of it.

    Returns:
        [] float; zero where no block has a loss (no coefficient set, or in evaluation).
    """
    losses = [loss for m in module.modules() if isinstance(m, MoE) for loss in m.router_losses.read()]
    if losses:
        return torch.stack(losses).sum()
    return torch.zeros((), device=next((p.device for p in module.parameters()), None))
