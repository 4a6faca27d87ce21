"""Clustered routing is trained beside others, and the figures say what they promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.convergence.clustered import ROUTERS, Clusters, KindsOfText, information, summary, train
from benchmarks.convergence.clusters import fit_clusters, prompt_embeddings
from benchmarks.convergence.corpus import Corpus
from tests.benchmarks.convergence.test_cluster import SETTING


def text() -> KindsOfText:
    """Four kinds of text, each of bytes of its own."""
    generator = np.random.default_rng(0)
    parts = [generator.integers(10 * kind, 10 * kind + 9, (2, 1000), np.uint8) for kind in range(4)]
    return KindsOfText.of([Corpus(*part) for part in parts])


def test_information_is_all_or_nothing_or_as_computed_by_hand() -> None:
    assert information(np.diag([3, 5])) == pytest.approx(1)
    assert information(np.array([[2, 4], [3, 6]])) == pytest.approx(0)
    # H(rows) = 1 bit, H(rows | columns) = 3/4 * h(1/3) bit.
    expected = 1 - 0.75 * (np.log2(3) - 2 / 3)
    assert information(np.array([[1, 1], [2, 0]])) == pytest.approx(expected)


def test_a_cluster_depends_on_the_first_half_of_a_sequence_alone() -> None:
    fitted = fit_clusters(text().corpus.train, SETTING.seq_len, 4)
    bytes_BT = torch.from_numpy(text().corpus.train[:960].astype(np.int64)).view(-1, 24)
    other_BT = bytes_BT.index_fill(1, torch.arange(12, 24), 7)
    assert torch.equal(prompt_embeddings(bytes_BT), prompt_embeddings(other_BT))
    for one in (fitted, None):
        clusters = Clusters(one)
        ids_B = clusters(bytes_BT)
        assert torch.equal(ids_B, clusters(other_BT))
        clusters.shift = 1
        assert torch.equal(clusters(bytes_BT), (ids_B + 1) % 4)
    assert len(Clusters(None)(bytes_BT).unique()) == 4


def test_every_router_is_measured_and_kinds_that_differ_get_groups_of_their_own() -> None:
    setting = replace(SETTING, capacity_factor=None, num_validation=40, top_k=2)
    fitted = fit_clusters(text().corpus.train, setting.seq_len, 4)
    figures = {router: [train(router, setting, text(), fitted, seed=0)] for router in ROUTERS}
    (clustered,), (by_chance,) = figures["clustered"], figures["clustered at random"]
    assert clustered.group_information > 0.9
    assert clustered.group_share > 0.9
    assert by_chance.group_information < 0.3
    assert by_chance.group_share < 0.6
    assert clustered.other_group_loss != clustered.loss
    assert all(run.expert_information >= run.group_information for (run,) in figures.values())
    table = summary(figures)
    assert table["top-k"]["loss_over_top_k"]["median"] == 1
    assert table["top-k"]["other_group_loss"]["median"] is None
