"""An emulated cluster trains like real ranks: the same losses, drops, loads and weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.convergence.cluster import EmulatedCluster
from benchmarks.convergence.corpus import Corpus
from benchmarks.convergence.real_ranks import train_on_ranks
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.systems import SYSTEMS
from benchmarks.convergence.training import make_model, train
from tests.helpers import nightly, run_ranks

SETTING = Setting(
    num_ranks=4,
    slots_per_rank=3,
    num_experts=8,
    aux_loss_coef=1e-2,
    num_layers=2,
    dim=32,
    hidden_dim=16,
    seq_len=24,
    sequences_per_rank=2,
    num_steps=5,
    warm_up=2,
    validate_every=5,
    num_validation=2,
)
TEXT = np.random.default_rng(0).integers(0, 40, 4000).astype(np.uint8)
CORPUS = Corpus(TEXT, TEXT)


@pytest.mark.parametrize("system", [*nightly("static", "symi"), "balanced", "dropless", "flexmoe-10"])
@pytest.mark.parametrize("top_k", [*nightly(1), 2])
def test_trains_like_four_real_ranks(system: str, top_k: int) -> None:
    # FlexMoE's first revision comes before the tenth step.
    num_steps = 11 if system == "flexmoe-10" else 5
    setting = replace(SETTING, num_steps=num_steps, top_k=top_k, bias_update_rate=1e-3 if top_k == 2 else 0.0)
    emulated = train(setting, system, 3, CORPUS)
    assert (sum(emulated.moved_pairs) > 0) == (system != "static")
    assert (max(emulated.dropped) > 0) == (system != "dropless")
    for ranks in run_ranks(train_on_ranks, 4, setting, system, 3, CORPUS):
        assert ranks.dropped == emulated.dropped
        assert ranks.largest_load == pytest.approx(emulated.largest_load)
        assert ranks.losses == pytest.approx(emulated.train_loss, rel=1e-5)


def test_evaluation_computes_every_assignment() -> None:
    torch.manual_seed(0)
    model = make_model(SETTING)
    for block in model.blocks:
        # They begin at zero, and would add nothing.
        torch.nn.init.normal_(block.moe.experts.expert_parameters()["down_proj"])
    bytes_BT = torch.from_numpy(TEXT[:96].reshape(4, 24).astype(np.int64))
    with torch.no_grad():
        expected = model(bytes_BT)
    cluster = EmulatedCluster(model, SYSTEMS["static"], 4, 3, 0.1, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(model(bytes_BT), expected)
    assert not torch.allclose(model(bytes_BT), expected)
    assert all(load.num_dropped_tokens > 0 for load in cluster.loads.values())
