"""Newton-Schulz iteration that makes matrices nearly orthogonal, as Muon needs it: many of one shape at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, coefficients: Sequence[float], num_steps: int, eps: float) -> Tensor:
    """Each matrix's singular values become about 1, and its singular vectors stay.

    Per matrix these are the operations of `torch.optim.Muon`, in bfloat16 and in its order. A tall matrix is
    orthogonalised as its transpose is, so the result for a transposed matrix is the transposed result.

    Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), Newton-Schulz with
    tuned coefficients.

    Args:
        matrices: [n, rows, columns] floating; n may be 0.
        coefficients: a, b, c of x -> a x + b x^3 + c x^5 of the singular values.
        num_steps: how often that is applied.
        eps: the least norm by which a matrix is divided first.

    Returns:
        [n, rows, columns] bfloat16.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.bfloat16()
    if is_tall:
        wide = wide.mT
    # No singular value is larger than the norm.
    wide = wide / torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(num_steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if is_tall else wide
