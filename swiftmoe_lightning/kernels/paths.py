"""Which implementation runs an operation here, and why."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY: Final = (8, 0)


@dataclass(frozen=True)
class Path:
    """name: "triton" or "torch". reason: a sentence for the user."""

    name: str
    reason: str


def choose(device: torch.device, *dtypes: torch.dtype) -> Path:
    """The path of an operation on floating tensors of these dtypes on `device`.

    Triton on an NVIDIA GPU of compute capability 8.0 or more, torch's reference elsewhere.
    """
    if _forced is not None:
        return Path(_forced, f"{_forced} is forced by `swiftmoe_lightning.kernels.paths.forced`.")
    path = _path_on(device)
    for dtype in dtypes:
        if path.name == "triton" and dtype not in DTYPES:
            name = str(dtype).removeprefix("torch.")
            return Path("torch", f"{name} runs the torch reference: the Triton kernels compute in float32.")
    return path


@functools.cache
def _path_on(device: torch.device) -> Path:
    if device.type == "cpu":
        return Path("torch", "CPU tensors run the torch reference: the Triton kernels need an NVIDIA GPU.")
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "AMD GPUs" if device.type == "cuda" else f"{device.type!r} tensors"
        return Path("torch", f"{kind} run the torch reference: the Triton kernels are tested on NVIDIA GPUs only.")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        found, needed = (".".join(map(str, c)) for c in (capability, _MIN_CAPABILITY))
        return Path("torch", f"{name} has compute capability {found}: the Triton kernels need {needed} or more.")
    if importlib.util.find_spec("triton") is None:
        return Path("torch", 'Triton is not installed: pip install "swiftmoe-lightning[triton]".')
    return Path("triton", f"Triton kernels on {name}.")


# Not a context variable: autograd runs a GPU's backward on a thread of its own, which would not see it.
_forced: str | None = None


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Run every operation on path `name` ("triton" or "torch"), for tests and for benchmarks of one against the other.

    "triton" on CPU tensors works under Triton's interpreter alone (`TRITON_INTERPRET=1`).
    """
    global _forced
    if name not in ("triton", "torch"):
        raise ValueError(f'path must be "triton" or "torch", got {name!r}.')
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
