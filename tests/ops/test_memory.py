"""Memory that is given out again."""

from __future__ import annotations

import torch

from swiftmoe_lightning.ops import memory
from swiftmoe_lightning.ops.memory import BlockPool, reused_empty

CPU = torch.device("cpu")


def test_a_tensor_has_the_memory_of_one_that_is_gone() -> None:
    first = reused_empty((3, 1 << 20), torch.float32, CPU)
    address = first.data_ptr()
    assert first.is_contiguous()
    assert first.shape == (3, 1 << 20)
    del first
    second = reused_empty((1 << 20, 3), torch.int32, CPU)
    assert second.data_ptr() == address


def test_memory_is_not_given_out_while_a_view_is_alive() -> None:
    first = reused_empty((1 << 20,), torch.float32, CPU).fill_(7)
    view = first[5:10].detach()
    del first
    second = reused_empty((1 << 20,), torch.float32, CPU).fill_(8)
    assert view.tolist() == [7.0] * 5
    assert second.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


def test_a_gradient_keeps_its_memory() -> None:
    leaf = torch.zeros(1 << 20, requires_grad=True)
    leaf.grad = reused_empty((1 << 20,), torch.float32, CPU).fill_(1)
    other = reused_empty((1 << 20,), torch.float32, CPU).fill_(2)
    assert leaf.grad.sum() == 1 << 20
    assert other.data_ptr() != leaf.grad.data_ptr()


def test_small_tensors_and_other_devices_are_ordinary() -> None:
    assert reused_empty((2, 3), torch.bfloat16, CPU).shape == (2, 3)
    assert reused_empty((1 << 20,), torch.float32, torch.device("meta")).is_meta


def test_a_tensor_made_in_inference_mode_can_be_trained_later() -> None:
    with torch.inference_mode():
        values = reused_empty((1 << 20,), torch.float32, CPU)
    assert not values.is_inference()


def test_a_block_fits_sizes_down_to_four_fifths_of_its_own() -> None:
    pool = BlockPool()
    large = pool.take(1000)
    assert large.untyped_storage().nbytes() >= 1000
    del large
    assert pool.take(900).untyped_storage().nbytes() >= 1000
    assert pool.take(600).untyped_storage().nbytes() < 700
    assert len(pool.blocks) == 2


def test_blocks_that_nobody_takes_go_back(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_MOST_IDLE", 2)
    pool = BlockPool()
    pool.take(1000)
    for _ in range(3):
        pool.take(10)
    assert len(pool.blocks) == 2
    pool.take(100_000)
    assert sorted(b.storage.nbytes() for b in pool.blocks)[1] > 10_000
    assert len(pool.blocks) == 2


def test_without_a_count_of_uses_nothing_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_pool", pool := BlockPool())
    monkeypatch.setattr(memory, "_use_count", None)
    assert reused_empty((1 << 20, 2), torch.float32, CPU).is_contiguous()
    assert not pool.blocks
