"""Slow, plain versions of the expert layer's operations: loops over tokens and rows, in float64, by autograd alone."""

from __future__ import annotations

import torch

# bfloat16 rounds by up to 4e-3, and a chain of matmuls and activations rounds five times.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_close(found, expected):
    """Norm of the error over the norm of the result, one tolerance for a dtype, everywhere."""
    found, tolerance, expected = found.detach().double(), TOLERANCE[found.dtype], expected.detach().double()
    assert found.shape == expected.shape
    error = float((found - expected).norm())
    assert error <= tolerance * float(expected.norm()), (error, float(expected.norm()))


def rows_of(kept_TK):
    """Boolean [T, K] -> (choice_R, rows_TK), rows in a scrambled order."""
    choice_R = kept_TK.flatten().nonzero().flatten()
    choice_R = choice_R[torch.randperm(len(choice_R), generator=torch.Generator().manual_seed(len(choice_R)))]
    rows_TK = torch.full(kept_TK.shape, -1)
    rows_TK.view(-1)[choice_R] = torch.arange(len(choice_R))
    return choice_R, rows_TK


def loop_mlp(x_RD, weights, slot_R, activation):
    """down(act(up(x))) row by row."""
    first = "gate_up_proj" if activation == "swiglu" else "up_proj"
    rows = []
    for x_D, slot in zip(x_RD, slot_R, strict=True):
        z = weights[first][slot] @ x_D
        if f"{first}_bias" in weights:
            z = z + weights[f"{first}_bias"][slot]
        if activation == "swiglu":
            half = len(z) // 2
            hidden = z[:half] * torch.sigmoid(z[:half]) * z[half:]
        elif activation == "gelu":
            hidden = z * 0.5 * (1 + torch.erf(z / 2**0.5))
        else:
            hidden = torch.clamp(z, min=0) ** 2
        out = weights["down_proj"][slot] @ hidden
        if "down_proj_bias" in weights:
            out = out + weights["down_proj_bias"][slot]
        rows.append(out)
    return torch.stack(rows) if rows else x_RD.new_zeros(0, weights["down_proj"].shape[1]) + 0 * x_RD.sum()


def make_weights(num_slots, dim, hidden_dim, activation, bias, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, rows = ("gate_up_proj", 2 * hidden_dim) if activation == "swiglu" else ("up_proj", hidden_dim)
    shapes = {first: (rows, dim), "down_proj": (dim, hidden_dim)}
    if bias:
        shapes |= {f"{first}_bias": (rows,), "down_proj_bias": (dim,)}
    return {
        name: (torch.randn(num_slots, *shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5).to(dtype)
        for name, shape in shapes.items()
    }


def gradients(out, inputs):
    """Gradients of a fixed random projection of `out`, by name; what did not take part counts as zero."""
    generator = torch.Generator().manual_seed(17)
    seed = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad(out, list(inputs.values()), seed, allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(inputs.items(), found, strict=True)
    }


def leaves(tensors, dtype=None):
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}
