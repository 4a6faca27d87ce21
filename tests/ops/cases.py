"""Slow, plain versions of the expert layer's operations: loops over tokens and rows, in float64, by autograd alone."""

from __future__ import annotations

import os
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

from swiftmoe_lightning.ops import SortedAssignments, backend

# bfloat16 rounds by up to 4e-3, and a chain of matmuls and activations rounds five times.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Where Triton's kernels are tested: under its interpreter on the CPU, or compiled on a GPU.
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available() else "cpu"


def assert_close(actual, expected):
    """Norm of the error over the norm of the result, one tolerance for a dtype, everywhere."""
    actual, tolerance, expected = actual.detach().double(), TOLERANCE[actual.dtype], expected.detach().double()
    assert actual.shape == expected.shape
    error = float((actual - expected).norm())
    assert error <= tolerance * float(expected.norm()), (error, float(expected.norm()))


def one_group(assignment_R, rows_TK):
    """Assignments in the rows that these say, all of one group."""
    ends_G = (assignment_R >= 0).sum().to(torch.int32).view(1)
    return SortedAssignments(assignment_R, rows_TK, ends_G, ends_G)


def scrambled(kept_TK):
    """Boolean [T, K] -> assignments of one group, rows in a scrambled order."""
    assignment_R = kept_TK.flatten().nonzero().flatten()
    seeded = torch.Generator().manual_seed(len(assignment_R))
    order_R = torch.randperm(len(assignment_R), generator=seeded, device="cpu")
    assignment_R = assignment_R[order_R.to(assignment_R.device)]
    rows_TK = torch.full(kept_TK.shape, -1, device=kept_TK.device)
    rows_TK.view(-1)[assignment_R] = torch.arange(len(assignment_R), device=kept_TK.device)
    return one_group(assignment_R, rows_TK)


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
    seed = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu").to(out)
    actual = torch.autograd.grad(out, list(inputs.values()), seed, allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(inputs.items(), actual, strict=True)
    }


def leaves(tensors, dtype=None):
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}


_FENCE = 256


def fenced(x):
    """A copy of `x` with nan on both sides of it in memory: what reads past its ends gets nan."""
    flat = torch.full((x.numel() + 2 * _FENCE,), float("nan"), dtype=x.dtype, device=x.device)
    inside = flat[_FENCE : _FENCE + x.numel()].view(x.shape)
    return inside.copy_(x.detach())


@contextmanager
def fenced_memory():
    """Inside, `torch.empty` gives memory full of nan (or a large number), with as much on both sides of it.

    What writes past the ends of it fails the test on leaving, and what leaves a place unwritten, by its nan.
    """
    real, blocks = torch.empty, []

    def empty(*size, dtype=torch.float32, device=None):
        shape = torch.Size(size if not size or isinstance(size[0], int) else size[0])
        flat = real(shape.numel() + 2 * _FENCE, dtype=dtype, device=device)
        blocks.append(flat.fill_(_poison(dtype)))
        return flat[_FENCE : _FENCE + shape.numel()].view(shape)

    with mock.patch.object(torch, "empty", empty):
        yield
    for flat in blocks:
        for fence in (flat[:_FENCE], flat[-_FENCE:]):
            assert (fence.isnan() if flat.dtype.is_floating_point else fence == _poison(flat.dtype)).all()


def _poison(dtype):
    if dtype == torch.uint8:
        return 173
    return float("nan") if dtype.is_floating_point else 10**9


def assert_triton_equals_eager(operation, values, *rest):
    """Outputs and gradients of `operation(*values, *rest)`, on Triton and on torch's eager version.

    values: name -> floating tensor; the eager version gets them in float64. Triton runs twice, to the same bits, in
    memory fenced by nan. Outputs that are whole numbers must be equal, the others, and the gradients, close.
    """
    values = {name: value.to(DEVICE) for name, value in values.items()}
    rest = tree_map_only(torch.Tensor, lambda r: r.to(DEVICE), rest)
    seed_dtype = next(iter(values.values())).dtype
    actual = []
    for _ in range(2):
        inputs = {name: fenced(value).requires_grad_() for name, value in values.items()}
        with backend.force_backend("triton"), fenced_memory():
            actual.append(_outputs_and_gradients(operation, inputs, rest, seed_dtype))
    with backend.force_backend("torch"):
        expected = _outputs_and_gradients(operation, leaves(values, torch.float64), rest, seed_dtype)
    for first, second, reference in zip(*actual, expected, strict=True):
        assert torch.equal(first, second)
        if first.is_floating_point():
            assert_close(first, reference)
        else:
            assert torch.equal(first, reference)


def _outputs_and_gradients(operation, inputs, rest, seed_dtype):
    outputs = operation(*inputs.values(), *rest)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(17)
    trained = [out for out in outputs if out.requires_grad]
    seeds = [torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu") for out in trained]
    # Rounded once, so that both runs get the same numbers.
    seeds = [seed.to(seed_dtype).to(out) for seed, out in zip(seeds, trained, strict=True)]
    gradients = torch.autograd.grad(trained, list(inputs.values()), seeds)
    for gradient, value in zip(gradients, inputs.values(), strict=True):
        assert (gradient.dtype, gradient.shape) == (value.dtype, value.shape)
    return outputs + list(gradients)
