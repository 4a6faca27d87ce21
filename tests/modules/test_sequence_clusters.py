"""k-means finds clusters that are there, alike from the same seed, and says what it cannot cluster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.materialize import materialize_dense


def clouds(num: int, scale: float = 0.1) -> tuple[Tensor, Tensor]:
    """Points around four corners, very differently many, and their corners."""
    generator = torch.Generator().manual_seed(0)
    of_N = torch.multinomial(torch.tensor([0.7, 0.2, 0.06, 0.04]), num, True, generator=generator)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    return corners[of_N] + scale * torch.randn(num, 2, generator=generator), of_N


def test_clusters_that_are_there_are_found_and_new_sequences_fall_into_them() -> None:
    points_ND, of_N = clouds(500)
    clusters = sml.SequenceClusters(4, 2)
    ids_N = clusters.fit(points_ND[:400])
    assert torch.equal(ids_N, clusters(points_ND[:400]))
    # One cluster for each corner, whatever its number.
    pairs = set(zip(of_N.tolist(), clusters(points_ND).tolist(), strict=True))
    assert len(pairs) == len({cluster for _, cluster in pairs}) == 4
    for cluster in range(4):
        mean_D = points_ND[:400][ids_N == cluster].mean(0)
        torch.testing.assert_close(clusters.centers_CD[cluster], mean_D, rtol=1e-5, atol=1e-5)


def test_a_seed_gives_the_same_centers_and_a_file_keeps_them() -> None:
    points_ND, _ = clouds(60, scale=0.5)
    first, second, loaded = (sml.SequenceClusters(5, 2) for _ in range(3))
    first.fit(points_ND, seed=1)
    second.fit(points_ND.double(), seed=1)
    assert torch.equal(first.centers_CD, second.centers_CD)
    second.fit(points_ND, seed=2)
    assert not torch.equal(first.centers_CD, second.centers_CD)
    loaded.load_state_dict(first.state_dict())
    for one in (loaded, copy.deepcopy(first)):
        assert torch.equal(one(points_ND), first(points_ND))
    # A local best: no point is nearer to the center of another cluster, and no center is not the mean of its own.
    distances_NC = torch.cdist(points_ND, first.centers_CD)
    assert torch.equal(distances_NC.argmin(1), first(points_ND))
    assert first(points_ND[:0]).shape == (0,)


def test_centers_made_late_are_none_yet() -> None:
    clusters = sml.SequenceClusters(2, 3, device="meta")
    materialize_dense(clusters, torch.device("cpu"))
    for one in (clusters, sml.SequenceClusters(2, 3)):
        with pytest.raises(RuntimeError, match="has no centers yet. Call fit"):
            one(torch.zeros(1, 3))


def test_what_cannot_be_clustered_is_refused() -> None:
    clusters = sml.SequenceClusters(3, 2)
    with pytest.raises(
        ValueError, match=r"dim=2\) fits finite embeddings \[sequences, 2\], got \[4, 3\]. Give one row"
    ):
        clusters.fit(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"got \[1, 2\] with inf or nan"):
        clusters.fit(torch.full((1, 2), torch.inf))
    with pytest.raises(ValueError, match="2 different embeddings cannot make 3 clusters. Give more sequences"):
        clusters.fit(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"dim=2\) takes embeddings \[sequences, 2\], got \[4, 3\]. Embed as for fit"):
        clusters(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="num_clusters must be a whole number of 1 or more, got 0"):
        sml.SequenceClusters(0, 2)
