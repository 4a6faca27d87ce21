"""The forward of `Experts` in evaluation with sharded experts: every rank computes a part of every expert.

Each rank has 1/g of the hidden dim of every expert (a piece). It gets the tokens of all ranks, computes what its pieces
add to each, and sends that to the token's rank, which sums up. So the ranks' loads are equal whatever the routing, and
no token is dropped. From MoEShard (arXiv 2503.08467, section 3).

g ranks of the group, T tokens of this rank, N tokens of all ranks, D model dim, E experts, K top-k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.distributed import RankGroup, gather_shares, phase, to_device
from swiftmoe_lightning.modules.forward import ExpertsOutput, StartedForward
from swiftmoe_lightning.modules.weights import prepare_weights
from swiftmoe_lightning.ops import expert_layer, sort_assignments

if TYPE_CHECKING:
    from swiftmoe_lightning.modules.experts import Experts


@dataclass(frozen=True, eq=False)
class AnnouncedTokens:
    """What all ranks of a group are about to compute.

    Attributes:
        tokens_g: [g], tokens of each rank.
        top_k: K.
        popularity_E: [E] int64, assignments of all ranks to each expert.
    """

    tokens_g: list[int]
    top_k: int
    popularity_E: np.ndarray


class ShardedEvaluation(ABC):
    """What an evaluation forward with sharded experts needs to know and do; the engine's `LayerEvaluation`.

    Attributes:
        ranks: the g ranks of the group.
    """

    ranks: RankGroup

    @abstractmethod
    def begin_forward(self, gather: Callable[[], Any]) -> AnnouncedTokens:
        """Wait for what all ranks have announced. Afterwards `weights` are up to date.

        Args:
            gather: what the context's `start_count` returned.

        Raises:
            FloatingPointError: on every rank, if any rank's scores are not finite.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """This rank's pieces of all E experts, each tensor as [E, ...] with a part of the hidden dim."""


def evaluates_sharded(experts: Experts) -> bool:
    """Whether a forward that begins now takes this way: in evaluation, and without gradients.

    Args:
        experts: in training mode or not. Checkpointing runs without gradients in training, too.
    """
    return experts.context.evaluation is not None and not experts.training and not torch.is_grad_enabled()


@torch.compiler.disable
def finish_sharded(experts: Experts, started: StartedForward) -> ExpertsOutput:
    """The second part of a forward, instead of `Experts.finish`.

    Args:
        experts: whose context has an `evaluation`.
        started: what `Experts.start` returned.

    Raises:
        FloatingPointError: for non-finite router weights, on every rank.
    """
    evaluation, tensor_ranks, x_TD = experts.context.evaluation, experts.context.tensor_ranks, started.x_TD
    assert evaluation is not None
    assert started.gather is not None
    with phase("count"):
        announced = evaluation.begin_forward(started.gather)
    ranks, tokens_g = evaluation.ranks, announced.tokens_g
    with torch.autocast(x_TD.device.type, enabled=False):
        with phase("dispatch"):
            x_ND, expert_ids_NK, weights_NK = _gather_tokens(ranks, announced, started)
        with phase("experts"):
            weights = prepare_weights(evaluation.weights(), x_TD.dtype, experts.transposed, experts.adapters)
            by_expert = sort_assignments(expert_ids_NK, experts.num_experts)
            part_ND = expert_layer(x_ND, weights_NK, by_expert, weights, experts.activation)
        with phase("combine"):
            parts_gTD = ranks.start_all_to_all(part_ND, tokens_g, [len(x_TD)] * ranks.size).wait()
            parts_gTD = parts_gTD.view(ranks.size, *x_TD.shape)
            out_TD = parts_gTD.sum(0, dtype=torch.promote_types(x_TD.dtype, torch.float32)).to(started.out_dtype)
    if tensor_ranks is not None:
        out_TD = gather_shares(out_TD, started.num_tokens, tensor_ranks)
    (popularity_E,) = to_device(x_TD.device, announced.popularity_E.astype(np.int32))
    num_data_ranks = ranks.size / (1 if tensor_ranks is None else tensor_ranks.size)
    return ExpertsOutput(out_TD, popularity_E, num_data_ranks, recomputes=False)


def _gather_tokens(
    ranks: RankGroup, announced: AnnouncedTokens, started: StartedForward
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, D] tokens of all ranks, [N, K] their experts and [N, K] the experts' weights, in the order of the ranks."""
    x_TD, tokens_g = started.x_TD, announced.tokens_g
    # A rank that evaluates nothing, and serves others, knows neither K nor the dtype of their weights.
    missing = announced.top_k - started.weights_TK.shape[1]
    expert_ids_TK = F.pad(started.expert_ids_TK, (0, missing), value=-1).to(torch.int32)
    weights_TK = F.pad(started.weights_TK, (0, missing)).to(torch.promote_types(x_TD.dtype, torch.float32))
    # One message: bits of the weights, and ids.
    bits_T = weights_TK.contiguous().view(torch.int32)
    labels_T = torch.cat([bits_T, expert_ids_TK], 1)

    def start(rows_T: Tensor) -> Callable[[], Tensor]:
        sends = [len(rows_T)] * ranks.size
        return ranks.start_all_to_all(rows_T.repeat(ranks.size, 1), sends, tokens_g).wait

    wait_for_tokens, wait_for_labels = start(x_TD), start(labels_T)
    x_ND, labels_N = wait_for_tokens(), wait_for_labels()
    bits_N, expert_ids_NK = labels_N.split([bits_T.shape[1], announced.top_k], 1)
    # A copy, not `contiguous()`, which leaves a single row as it is: its stride is not of whole float64 numbers.
    bits_N = bits_N.clone(memory_format=torch.contiguous_format)
    return x_ND, expert_ids_NK.contiguous(), bits_N.view(weights_TK.dtype)
