"""Which backend runs an operation, why, and that a test can force it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from swiftmoe_lightning.ops import backend


def test_float64_and_the_cpu_run_the_reference_and_say_so():
    assert backend.choose_backend(torch.device("cpu"), torch.float32) == backend.Backend(
        "torch", "CPU tensors run the torch reference: the Triton kernels need an NVIDIA GPU."
    )
    assert backend.choose_backend(torch.device("meta")).reason.startswith("'meta' tensors run the torch reference")


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to be a GPU of some capability; returns what sets it."""
    backend._backend_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.version, "hip", None)
    yield lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend._backend_on.cache_clear()


def test_a_gpu_runs_triton_where_it_can_and_says_why_not(gpu, monkeypatch):
    pytest.importorskip("triton")
    device = torch.device("cuda", 0)
    gpu(9, 0)
    assert backend.choose_backend(device, torch.bfloat16, torch.float32) == backend.Backend(
        "triton", "Triton kernels on NVIDIA X."
    )
    mixed = backend.choose_backend(device, torch.bfloat16, torch.float64)
    assert mixed == backend.Backend("torch", "float64 runs the torch reference: the Triton kernels compute in float32.")
    backend._backend_on.cache_clear()
    gpu(7, 5)
    actual = backend.choose_backend(device, torch.float32)
    assert actual == backend.Backend(
        "torch", "NVIDIA X has compute capability 7.5: the Triton kernels need 8.0 or more."
    )
    backend._backend_on.cache_clear()
    gpu(8, 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in backend.choose_backend(device, torch.float32).reason


def test_a_backend_that_is_forced_ends_with_its_block():
    with pytest.raises(ValueError, match="got 'cuda'"), backend.force_backend("cuda"):
        pass
    with backend.force_backend("triton"), backend.force_backend("torch"):
        assert backend.choose_backend(torch.device("cpu")).name == "torch"
    assert "forced" not in backend.choose_backend(torch.device("cpu")).reason


@pytest.mark.parametrize(
    ("dtype", "rows_per_slot", "hidden_dim", "top_k", "expected"),
    [
        (torch.bfloat16, 512, 1024, 8, "triton"),
        (torch.bfloat16, 2048, 14336, 2, "torch"),
        (torch.bfloat16, 4096, 1024, 2, "torch"),
        (torch.bfloat16, 4096, 1024, 8, "triton"),
        (torch.float32, 2048, 14336, 2, "triton"),
        (torch.float64, 512, 1024, 8, "torch"),
    ],
)
def test_a_small_table_picks_the_layers_backend_on_a_gpu(dtype, rows_per_slot, hidden_dim, top_k, expected):
    gpu = backend.Backend("triton", "Triton kernels on a test.")
    with mock.patch.object(backend, "_backend_on", return_value=gpu):
        actual = backend.choose_layer_backend(torch.device("cuda"), dtype, rows_per_slot, hidden_dim, top_k)
    assert actual.name == expected
    assert actual.reason.endswith(".")
