"""Chooses what runs an operation, Triton or torch, by device, dtype and sizes; and the reason, for the user."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY: Final = (8, 0)


@dataclass(frozen=True)
class Backend:
    """The implementation that runs an operation.

    Attributes:
        name: "triton" or "torch".
        reason: why, as a sentence for the user.
    """

    name: str
    reason: str


# torch.compile calls it once for each graph, and does not trace it.
@torch.compiler.assume_constant_result
def choose_backend(device: torch.device, *dtypes: torch.dtype) -> Backend:
    """The backend of an operation on floating tensors.

    Triton on an NVIDIA GPU of compute capability 8.0 or more, torch's reference elsewhere.

    Args:
        device: of the tensors.
        *dtypes: of the floating tensors, if there are any.
    """
    if _forced is not None:
        return Backend(_forced, f"{_forced} is forced by `swiftmoe_lightning.ops.backend.force_backend`.")
    backend = _backend_on(device)
    for dtype in dtypes:
        if backend.name == "triton" and dtype not in DTYPES:
            name = str(dtype).removeprefix("torch.")
            return Backend("torch", f"{name} runs the torch reference: the Triton kernels compute in float32.")
    return backend


def uses_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors, all on one device, runs Triton. For the bodies of custom operators."""
    dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return choose_backend(tensors[0].device, *dtypes).name == "triton"


def needs_operator(x: Tensor) -> bool:
    """Whether an operation on `x` must be a custom operator: in torch.compile, and on tensors that are not ordinary."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter)


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors may call its eager version instead of its custom operator.

    So it is where Triton would not run, and nothing needs the operator (only the first tensor is looked at).
    """
    return not needs_operator(tensors[0]) and not uses_triton(*tensors)


# From these sizes on, gathering and activating outside of the products cost little beside them, and cuBLAS's grouped
# product is faster than the fused kernels: by 5 - 22 % on an H100 (benchmarks/README.md; shapes A, C2 and D).
_WIDE_EXPERT: Final = 2048
_MANY_ROWS: Final = 2048


def choose_layer_backend(
    device: torch.device, dtype: torch.dtype, rows_per_slot: int, hidden_dim: int, top_k: int
) -> Backend:
    """The backend of a whole expert layer: "triton" runs the fused kernels, "torch" the operations and `F.grouped_mm`.

    `F.grouped_mm` is fast in bfloat16 only.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        rows_per_slot: mean rows of an expert.
        hidden_dim: F.
        top_k: K.
    """
    backend = choose_backend(device, dtype)
    if _forced is not None or backend.name != "triton" or dtype != torch.bfloat16:
        return backend
    # Last: under torch.compile a look at the number of rows is a guard.
    if hidden_dim >= _WIDE_EXPERT or (top_k <= 2 and rows_per_slot >= _MANY_ROWS):
        return Backend("torch", "wide experts with many rows run F.grouped_mm between Triton's permute and combine.")
    return backend


@functools.cache
def _backend_on(device: torch.device) -> Backend:
    if device.type == "cpu":
        return Backend("torch", "CPU tensors run the torch reference: the Triton kernels need an NVIDIA GPU.")
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "AMD GPUs" if device.type == "cuda" else f"{device.type!r} tensors"
        return Backend("torch", f"{kind} run the torch reference: the Triton kernels are tested on NVIDIA GPUs only.")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        actual, needed = (".".join(map(str, c)) for c in (capability, _MIN_CAPABILITY))
        return Backend("torch", f"{name} has compute capability {actual}: the Triton kernels need {needed} or more.")
    if importlib.util.find_spec("triton") is None:
        return Backend("torch", 'Triton is not installed: pip install "swiftmoe-lightning[triton]".')
    return Backend("triton", f"Triton kernels on {name}.")


# Not a context variable: autograd runs a GPU's backward on a thread of its own, which would not see it.
_forced: str | None = None


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Run every operation on one backend: for tests, and benchmarks of one against the other.

    Args:
        name: "triton" or "torch". "triton" on CPU tensors works under Triton's interpreter alone
            (`TRITON_INTERPRET=1`).

    Raises:
        ValueError: for another name.
    """
    global _forced
    if name not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton" or "torch", got {name!r}.')
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
