"""Clusters of sequences of bytes by their prompts, and blocks of experts that get them.

B sequences, T bytes of a sequence, P bytes of a prompt, N sequences to fit, V bytes there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftmoe_lightning.demo.gpt import GPT, NUM_BYTES
from swiftmoe_lightning.demo.text import Sequences
from swiftmoe_lightning.modules import SequenceClusters

# Sequences that the centers are fitted to. Neither they nor the runs' are drawn by each other's seed.
_NUM_FITTED: Final = 4096
_FIT_SEED: Final = 10**6


def prompts(bytes_BT: Tensor) -> Tensor:
    """[B, P], the first half of each sequence, which is known before the rest is predicted."""
    return bytes_BT[:, : bytes_BT.shape[1] // 2]


def prompt_embeddings(bytes_BT: Tensor) -> Tensor:
    """[B, T] -> [B, V] float32, square roots of each byte's share of the prompt (their distance is Hellinger's)."""
    return F.one_hot(prompts(bytes_BT), NUM_BYTES).float().mean(1).sqrt()


def fit_clusters(text: np.ndarray, seq_len: int, num_clusters: int) -> SequenceClusters:
    """k-means of prompts of the training text; one seed, as the clusters are a part of what is compared.

    Args:
        text: [N] uint8.
        seq_len: T.
        num_clusters: how many.
    """
    sequences = Sequences.at_random(text, seq_len, _NUM_FITTED, _FIT_SEED)
    bytes_NT = torch.stack([sequences[i][:-1] for i in range(_NUM_FITTED)])
    clusters = SequenceClusters(num_clusters, NUM_BYTES)
    clusters.fit(prompt_embeddings(bytes_NT))
    return clusters


def give_ids(model: GPT, ids_of: Callable[[Tensor], dict[str, Tensor]]) -> None:
    """Let every block of experts have the ids that its router chooses by.

    Args:
        model: its blocks get them with every forward.
        ids_of: [B, T] bytes -> arguments of `MoE.forward`.
    """
    ids: dict[str, Tensor] = {}

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ids.update(ids_of(inputs[0]))

    def add(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        return inputs, {**options, **ids}

    model.register_forward_pre_hook(note)
    for block in model.blocks:
        block.moe.register_forward_pre_hook(add, with_kwargs=True)
