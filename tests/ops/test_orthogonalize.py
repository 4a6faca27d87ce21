"""Newton-Schulz on many matrices at once, against torch's on each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swiftmoe_lightning.ops import orthogonalize

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 10), (4, 10, 24), (0, 3, 4)])
def test_each_matrix_is_torchs_to_the_bit(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    orthogonal = orthogonalize(matrices, COEFFICIENTS, 5, 1e-7)
    assert orthogonal.dtype == torch.bfloat16
    assert orthogonal.shape == shape
    for matrix, ours in zip(matrices, orthogonal, strict=True):
        parameter = nn.Parameter(torch.zeros_like(matrix))
        parameter.grad = matrix
        torch.optim.Muon([parameter], lr=1.0, momentum=0.0, weight_decay=0.0, adjust_lr_fn="original").step()
        ratio = max(1, shape[1] / shape[2]) ** 0.5
        assert torch.equal(parameter.detach(), torch.zeros_like(matrix).add_(ours, alpha=-ratio))


def test_singular_values_become_about_one_and_zeros_stay() -> None:
    matrices = (
        torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1e3])[:, None, None]
    )
    values = torch.linalg.svdvals(orthogonalize(matrices, COEFFICIENTS, 5, 1e-7).float())
    assert 0.6 < values.min() < values.max() < 1.3
    assert not orthogonalize(torch.zeros(1, 4, 6), COEFFICIENTS, 5, 1e-7).any()
