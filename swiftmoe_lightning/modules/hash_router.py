"""A router that chooses by token id. T tokens, D model dim, E experts, K top-k, V token ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swiftmoe_lightning.config import check_whole
from swiftmoe_lightning.modules.router import RouterOutput, TopKRouter


class HashRouter(TopKRouter):
    """Experts by a fixed table of token ids, weights by learned scores, as in the hash layers of DeepSeek-V4.

    The table is random (Hash Layers, Roller et al., arXiv 2106.04426; there the one expert has weight 1).
    `moe(x, token_ids=ids)` gives the ids. A hash of hidden states would not do: they change as the model learns.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, different experts for each token id.
        vocab_size: V.
        seed: of the table, which is alike on all ranks. Layers with one seed have one table.
        score: as of `TopKRouter`.
        renormalize: as of `TopKRouter`.
        device: of the weight and the table.
        dtype: of the weight.

    Attributes:
        table: its buffer `expert_ids_VK`, [V, K] int64, may be written on all ranks: with a table that spreads
            frequent tokens evenly, or DeepSeek-V4's `tid2eid`.

    Raises:
        ValueError: for what `TopKRouter` refuses, or a vocab_size below 1.
    """

    def __init__(  # noqa: PLR0913 - public options
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        vocab_size: int,
        seed: int = 0,
        score: str = "softmax",
        renormalize: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Without a bias: there is no choice that it could change.
        super().__init__(dim, num_experts, top_k, score=score, renormalize=renormalize, device=device, dtype=dtype)
        check_whole(vocab_size=vocab_size)
        self.table = TokenTable(vocab_size, num_experts, top_k, seed, self.weight.device)

    def choose(self, logits_TE: Tensor, token_ids_T: Tensor | None) -> RouterOutput:
        """See `TopKRouter.choose`.

        Raises:
            ValueError: without token ids.
        """
        if token_ids_T is None:
            raise ValueError("HashRouter chooses by token ids, and got none. Call moe(x, token_ids=ids).")
        return self.weigh(logits_TE, self.table(token_ids_T))


class TokenTable(nn.Module):
    """A fixed table of K different experts for each token id, drawn from a seed.

    Args:
        vocab_size: V.
        num_experts: E.
        top_k: K.
        seed: the same one gives the same table anywhere.
        device: of the table.
    """

    expert_ids_VK: Tensor

    def __init__(self, vocab_size: int, num_experts: int, top_k: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.num_experts, self.seed = num_experts, seed
        self.register_buffer("expert_ids_VK", torch.empty(vocab_size, top_k, dtype=torch.int64, device=device))
        if not self.expert_ids_VK.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew, with the same result."""
        vocab_size, top_k = self.expert_ids_VK.shape
        generator = torch.Generator("cpu").manual_seed(self.seed)
        order_VE = torch.rand(vocab_size, self.num_experts, generator=generator, device="cpu")
        self.expert_ids_VK.copy_(order_VE.topk(top_k, dim=-1).indices)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """[T] int of 0..V-1 -> [T, K] int64."""
        return self.expert_ids_VK[token_ids_T]
