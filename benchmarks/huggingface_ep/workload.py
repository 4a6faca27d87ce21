"""The training loop that is measured: a Qwen3-MoE that transformers loads with expert parallelism, on drawn routes.

T tokens of a rank and step, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

import swiftmoe_lightning as sml
from benchmarks.common.command_line import setting
from swiftmoe_lightning.huggingface.sharded_at_load import engine_of

ROUTINGS: Final = ("balanced", "zipf")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and of each rank's batch."""

    layers: int = setting(4, "decoder layers, all with MoE")
    dim: int = setting(128, "model dim")
    hidden_dim: int = setting(256, "hidden dim of an expert")
    experts: int = setting(16, "of a layer; transformers' own expert parallelism needs a multiple of --ep-size")
    top_k: int = setting(2, "experts of a token")
    tokens: int = setting(512, "of each rank's batch, one sequence")


def save_model(sizes: Sizes, folder: Path) -> None:
    """Write a random model of these sizes to the folder."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=sizes.dim,
        intermediate_size=sizes.hidden_dim,
        moe_intermediate_size=sizes.hidden_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=sizes.dim // 4,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        max_position_embeddings=sizes.tokens,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


class DrawnRoutes:
    """A forward hook of a router, by which experts are drawn at random with fixed popularities.

    "balanced": all are equally popular. "zipf": the i-th has 1 / i of the first one's, in a fixed random order. Routers
    of one seed draw alike, whatever their models learn; the router's weights keep gradients.
    """

    def __init__(self, routing: str, seed: int) -> None:
        self._routing = routing
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, K], ids [T, K]) -> the same with drawn ids, different ones for each token."""
        logits_TE, _, ids_TK = output
        popularity_E = torch.ones(logits_TE.shape[1])
        if self._routing == "zipf":
            order = torch.randperm(len(popularity_E), generator=torch.Generator().manual_seed(0))
            popularity_E[order] = 1 / torch.arange(1.0, len(popularity_E) + 1)
        race_TE = torch.empty(logits_TE.shape).exponential_(generator=self._generator)
        ids_TK = (popularity_E / race_TE).topk(ids_TK.shape[1], dim=-1).indices
        weights_TK = logits_TE.softmax(-1).gather(-1, ids_TK)
        return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


class TrainingLoop:
    """A model under an implementation of expert parallelism, its optimizer and one batch.

    Args:
        folder: of the model.
        implementation: "swiftmoe", or one of transformers' own.
        routing: one of ROUTINGS.
        ep_size: ranks of an expert group.
    """

    def __init__(self, folder: str, implementation: str, routing: str, ep_size: int) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        sml.register_hf_experts()
        sizes = {"fsdp_size": dist.get_world_size(), "ep_size": ep_size}
        distributed_config = DistributedConfig(**sizes, ep_implementation=implementation)
        self.model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=distributed_config).train()
        routers = [module for name, module in self.model.named_modules() if name.endswith("mlp.gate")]
        for number, router in enumerate(routers):
            router.register_forward_hook(DrawnRoutes(routing, seed=dist.get_rank() * len(routers) + number))
        self._engine = engine_of(self.model)
        experts = {id(p): p for name, p in self.model.named_parameters() if ".experts." in name}
        dense = [p for p in self.model.parameters() if id(p) not in experts]
        # transformers' Trainer groups by mesh, and takes fused AdamW by default.
        groups: list[dict[str, list[nn.Parameter]]] = [{"params": list(experts.values())}, {"params": dense}]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(dist.get_rank())
        length = self.model.config.max_position_embeddings
        self._ids = torch.randint(self.model.config.vocab_size, (1, length), generator=generator)

    def run(self, steps: int) -> None:
        """Training steps. Their last weights have arrived at the end, on all ranks."""
        for _ in range(steps):
            self.model(input_ids=self._ids, labels=self._ids).loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        if self._engine is not None:
            self._engine.wait_for_weights()
        dist.barrier()
