"""Copies between the host and the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swiftmoe_lightning.distributed import HostCopy, to_device, to_host

CPU = torch.device("cpu")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.bool_])
def test_arrays_arrive_with_their_shapes_in_one_buffer(dtype: type[np.generic]) -> None:
    arrays = [
        np.arange(size).reshape(shape).astype(dtype) for size, shape in [(3, 3), (0, (0, 4)), (6, (2, 3)), (4, 4)]
    ]
    arrays.append(arrays[2].T)
    tensors = to_device(CPU, *arrays)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_a_later_write_to_an_array_does_not_reach_the_device() -> None:
    array = np.ones(2)
    (tensor,) = to_device(CPU, array)
    array[:] = 7
    assert tensor.tolist() == [1, 1]


def test_the_host_gets_numbers() -> None:
    assert to_host(torch.tensor([[1, 2]])).tolist() == [[1, 2]]


def test_on_a_cpu_a_copy_waits_for_its_exchange_when_it_is_read() -> None:
    calls = []

    def arrive() -> torch.Tensor:
        calls.append("arrive")
        return torch.ones(1)

    copy = HostCopy(CPU, arrive)
    calls.append("other work")
    assert copy.wait().tolist() == [1]
    assert calls == ["other work", "arrive"]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_only_a_read_waits() -> None:
    device = torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        numbers, one = to_device(device, np.arange(5), np.array([1]))
        copy = HostCopy(device, lambda: numbers + one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copy.wait().tolist() == [1, 2, 3, 4, 5]
