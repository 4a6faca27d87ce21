"""A GPT over bytes whose feed-forwards are MoE blocks.

B sequences, T positions, D model dim, H heads, C channels of a head, V = 256 byte values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from swiftmoe_lightning.demo.options import HEAD_DIM
from swiftmoe_lightning.modules import Experts, MoE, auxiliary_loss

NUM_BYTES: Final = 256


def rotate(heads_BHTC: Tensor) -> Tensor:
    """[B, H, T, C], channel pairs rotated by their position: scores depend on distances (RoPE, arXiv 2104.09864).

    Args:
        heads_BHTC: queries or keys; C is even, and channel c is paired with c + C/2.
    """
    num_positions, width = heads_BHTC.shape[-2:]
    speed_C = 10_000 ** (-torch.arange(0, width, 2, device=heads_BHTC.device) / width)
    angle_TC = torch.arange(num_positions, device=heads_BHTC.device)[:, None] * speed_C
    cos_TC, sin_TC = angle_TC.cos().to(heads_BHTC.dtype), angle_TC.sin().to(heads_BHTC.dtype)
    a_BHTC, b_BHTC = heads_BHTC.chunk(2, dim=-1)
    return torch.cat([a_BHTC * cos_TC - b_BHTC * sin_TC, a_BHTC * sin_TC + b_BHTC * cos_TC], dim=-1)


class Attention(nn.Module):
    """Causal self-attention: [B, T, D] -> [B, T, D].

    Args:
        dim: D, a multiple of `HEAD_DIM`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        parts_BTD = self.qkv_proj(x_BTD).chunk(3, dim=-1)
        q_BHTC, k_BHTC, v_BHTC = (part_BTD.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part_BTD in parts_BTD)
        # Normalized queries and keys keep scores small at any learning rate.
        q_BHTC, k_BHTC = (rotate(F.rms_norm(x_BHTC, (HEAD_DIM,))) for x_BHTC in (q_BHTC, k_BHTC))
        mixed_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
        out_BTD: Tensor = self.out_proj(mixed_BHTC.transpose(1, 2).flatten(2))
        return out_BTD


class Block(nn.Module):
    """Attention, then experts, each behind an RMSNorm and in a residual.

    Args:
        dim: D, a multiple of `HEAD_DIM`.
        **moe_options: what `MoE` takes beside dim.
    """

    def __init__(self, dim: int, **moe_options: Any) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(dim), Attention(dim)
        self.moe_norm, self.moe = nn.RMSNorm(dim), MoE(dim, **moe_options)
        # At first attention adds nothing, so that the routers see the bytes and not the noise of earlier blocks.
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.moe.experts.expert_parameters()["down_proj"])

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        out_BTD: Tensor = x_BTD + self.moe(self.moe_norm(x_BTD))
        return out_BTD


class GPT(nn.Module):
    """Bytes -> scores of the next byte.

    Args:
        num_layers: blocks, one after the other.
        dim: D, a multiple of `HEAD_DIM`.
        **moe_options: what `MoE` takes beside dim.
    """

    def __init__(self, num_layers: int, dim: int, **moe_options: Any) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(NUM_BYTES, dim)
        self.blocks = nn.Sequential(*(Block(dim, **moe_options) for _ in range(num_layers)))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, NUM_BYTES, bias=False)
        for layer in (self.byte_embedding, self.head):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T, V] logits."""
        logits_BTV: Tensor = self.head(self.norm(self.blocks(self.byte_embedding(bytes_BT))))
        return logits_BTV


def next_byte_loss(model: nn.Module, batch_BT: Tensor) -> Tensor:
    """[] nats a byte: the mean over all bytes but the first of each sequence.

    Args:
        model: [B, T] int64 -> [B, T, V] logits.
        batch_BT: [B, T + 1] int64 bytes.
    """
    return F.cross_entropy(model(batch_BT[:, :-1]).flatten(0, 1), batch_BT[:, 1:].flatten())


class LanguageModel(L.LightningModule):
    """Trains a `GPT` with AdamW. Batches are [B, T + 1] int64 bytes.

    Logs `train/loss` and `val/loss`, cross-entropy in nats a byte. Validation drops nothing, also where training has a
    capacity, so that its loss does not depend on the placement.

    Args:
        model: what is trained.
        lr: the learning rate. It is reached after a tenth of `num_steps`, and stays: where it fell towards the end, a
            loss would say how far a run is, and not what it has learnt.
        num_steps: optimizer steps of the whole training.

    Attributes:
        val_losses: nats a byte, of each validation.
        val_steps: optimizer steps done before each.
    """

    def __init__(self, model: GPT, lr: float, num_steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.num_steps = model, lr, num_steps
        self.val_loss = MeanMetric()
        self.val_losses: list[float] = []
        self.val_steps: list[int] = []

    def training_step(self, batch_BT: Tensor, _: int) -> Tensor:
        """[], the loss with the router losses; logs it without them."""
        loss = next_byte_loss(self.model, batch_BT)
        self.log("train/loss", loss, prog_bar=True)
        return loss + auxiliary_loss(self.model)

    def validation_step(self, batch_BT: Tensor, _: int) -> None:
        """Log the mean loss so far, of a model that drops nothing."""
        with dropless(self.model):
            self.val_loss.update(next_byte_loss(self.model, batch_BT), weight=len(batch_BT))
        self.log("val/loss", self.val_loss, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the mean loss of this validation."""
        self.val_losses.append(float(self.val_loss.compute()))
        self.val_steps.append(self.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a learning rate that rises step by step, and then stays."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, betas=(0.9, 0.95), weight_decay=0.1)
        warmup = max(self.num_steps // 10, 1)
        schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@contextmanager
def dropless(model: nn.Module) -> Iterator[None]:
    """Inside the block, no expert of `model` drops assignments."""
    capacities = {m: m.capacity for m in model.modules() if isinstance(m, Experts)}
    try:
        for experts in capacities:
            experts.capacity = None
        yield
    finally:
        for experts, capacity in capacities.items():
            experts.capacity = capacity
