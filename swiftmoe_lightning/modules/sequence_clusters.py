"""Clusters of sequences, by k-means. N sequences to fit, B sequences, D embedding dim, C clusters."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from swiftmoe_lightning.config import check_whole

_MOST_ROUNDS: Final = 100


class SequenceClusters(nn.Module):
    """Which cluster a sequence belongs to: the nearest of C centers, which `fit` finds by k-means.

    For `ClusteredRouter`. The embedding is yours: of an encoder, a mean of the embeddings of tokens, counts of words.
    A decoder must have it before it routes the first token that it is trained to predict, and has it again when it
    generates: embed the prompt, the text before, or the document's source, and not the whole sequence.

    Args:
        num_clusters: C.
        dim: D.
        device: of the centers.

    Attributes:
        centers_CD: [C, D] float32, a buffer; nan until `fit` or a checkpoint has set it.

    Raises:
        ValueError: for sizes below 1.
    """

    centers_CD: Tensor

    def __init__(self, num_clusters: int, dim: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_whole(num_clusters=num_clusters, dim=dim)
        self.register_buffer("centers_CD", torch.empty(num_clusters, dim, dtype=torch.float32, device=device))
        if not self.centers_CD.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget the centers."""
        self.centers_CD.fill_(torch.nan)

    @torch.no_grad()
    def fit(self, embeddings_ND: Tensor, seed: int = 0) -> Tensor:
        """Find the centers: k-means++ (Arthur and Vassilvitskii, 2007), then Lloyd's rounds until none changes.

        The same embeddings and seed give the same centers: give all ranks the same ones, or fit on one and load its
        state on the others.

        Args:
            embeddings_ND: [N, D] floating, finite; in memory at once. Scale them as their distances should count.
            seed: of the first centers.

        Returns:
            [N] int64, the clusters of these sequences.

        Raises:
            ValueError: for another shape, values that are not finite, or fewer than C different embeddings.
        """
        num_clusters, dim = self.centers_CD.shape
        points_ND = embeddings_ND.to(self.centers_CD.device, torch.float64)
        if points_ND.dim() != 2 or points_ND.shape[1] != dim or not points_ND.isfinite().all():
            raise ValueError(
                f"SequenceClusters(dim={dim}) fits finite embeddings [sequences, {dim}], got {list(points_ND.shape)}"
                f"{'' if points_ND.isfinite().all() else ' with inf or nan'}. Give one row for each sequence."
            )
        num_different = len(points_ND.unique(dim=0))
        if num_different < num_clusters:
            raise ValueError(
                f"{num_different} different embeddings cannot make {num_clusters} clusters. Give more sequences, or "
                "choose fewer clusters."
            )
        centers_CD = _first_centers(points_ND, num_clusters, seed)
        ids_N = _nearest(points_ND, centers_CD)
        for _ in range(_MOST_ROUNDS):
            centers_CD = _means(points_ND, ids_N, centers_CD)
            before_N, ids_N = ids_N, _nearest(points_ND, centers_CD)
            if torch.equal(ids_N, before_N):
                break
        self.centers_CD.copy_(centers_CD)
        return self(embeddings_ND)

    @torch.no_grad()
    def forward(self, embeddings_BD: Tensor) -> Tensor:
        """[B, D] floating -> [B] int64, the nearest centers. Waits for the GPU once.

        Raises:
            ValueError: for another dim.
            RuntimeError: before there are centers.
        """
        dim = self.centers_CD.shape[1]
        if embeddings_BD.dim() != 2 or embeddings_BD.shape[1] != dim:
            raise ValueError(
                f"SequenceClusters(dim={dim}) takes embeddings [sequences, {dim}], got {list(embeddings_BD.shape)}. "
                "Embed as for fit, one row for each sequence."
            )
        if self.centers_CD.isnan().any():
            raise RuntimeError("SequenceClusters has no centers yet. Call fit(embeddings), or load a fitted state.")
        return _nearest(embeddings_BD.to(self.centers_CD), self.centers_CD)


def _first_centers(points_ND: Tensor, num_clusters: int, seed: int) -> Tensor:
    """[C, D], points far from each other: each next one is drawn by its squared distance to those before."""
    # Drawn on the CPU, where a seed means the same for every device.
    generator = torch.Generator("cpu").manual_seed(seed)
    centers = [points_ND[int(torch.randint(len(points_ND), (), generator=generator))]]
    while len(centers) < num_clusters:
        squared_N = _distances(points_ND, torch.stack(centers)).min(-1).values.square().cpu()
        centers.append(points_ND[int(torch.multinomial(squared_N, 1, generator=generator))])
    return torch.stack(centers)


def _means(points_ND: Tensor, ids_N: Tensor, centers_CD: Tensor) -> Tensor:
    """[C, D], the mean of each cluster; a cluster without points stays where it was."""
    sums_CD = torch.zeros_like(centers_CD).index_add_(0, ids_N, points_ND)
    counts_C1 = torch.bincount(ids_N, minlength=len(centers_CD)).unsqueeze(1)
    return torch.where(counts_C1 > 0, sums_CD / counts_C1.clamp(min=1), centers_CD)


def _nearest(points_ND: Tensor, centers_CD: Tensor) -> Tensor:
    """[N] int64."""
    return _distances(points_ND, centers_CD).argmin(-1)


def _distances(points_ND: Tensor, centers_CD: Tensor) -> Tensor:
    """[N, C], without the products that lose the distance of near points."""
    return torch.cdist(points_ND, centers_CD, compute_mode="donot_use_mm_for_euclid_dist")
