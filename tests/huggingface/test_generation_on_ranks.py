"""`generate` of converted models whose experts are spread: tokens of the original alone, however uneven the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swiftmoe_lightning as sml
from swiftmoe_lightning.config import EVALUATIONS
from tests import hf_models
from tests.engine.models import RandomPolicy
from tests.helpers import nightly, run_ranks

pytest.importorskip("transformers")


def prompts(rank: int) -> list[tuple[Tensor, int]]:
    """This rank's calls: [B, LENGTH] tokens and how many come; differently many calls, sequences and tokens."""
    sizes = {0: [(1, 2, 5), (2, 4, 2), (2, 6, 1)], 1: [(3, 3, 9)]}[rank]
    return [(hf_models.tokens(i, batch)[:, :length], new) for i, (batch, length, new) in enumerate(sizes)]


def generate(model: Any, calls: list[tuple[Tensor, int]], **options: Any) -> list[Tensor]:
    return [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new, **options
        )
        for ids, new in calls
    ]


def generate_on_ranks(family: str) -> None:
    calls = prompts(dist.get_rank())
    expected = generate(hf_models.build(family).eval(), calls)
    assert len({tuple(row) for tokens in expected for row in tokens.tolist()}) > 1
    for evaluate in EVALUATIONS:
        model = sml.convert(hf_models.build(family)).eval()
        config = sml.SwiftMoEConfig(slots_per_rank=4, placement=RandomPolicy, evaluate=evaluate)
        engine = sml.SwiftMoEEngine(model, config)
        # As many calls on each rank, of any lengths: ranks that are through run along.
        together = generate(model, calls[:1], synced_gpus=True)
        # Any number of calls: ranks that are through serve the others.
        apart = generate(model, calls, synced_gpus=False)
        engine.join()
        assert all(layer.slots.is_cut == (evaluate == "sharded") for layer in engine.layers)
        for actual, tokens in zip(together + apart, expected[:1] + expected, strict=True):
            assert torch.equal(actual, tokens), (family, evaluate)


@pytest.mark.parametrize("family", ["gpt_oss", *nightly("qwen3_moe", "qwen3_next")])
def test_uneven_generation_gives_the_tokens_of_one_process(family: str) -> None:
    run_ranks(generate_on_ranks, 2, family)
