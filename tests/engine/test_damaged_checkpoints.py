"""Checkpoints whose bytes were changed on disk do not load: torch writes checksums, and does not verify them."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.checkpoint import (
    load_meta,
    load_model,
    load_optimizers,
    read_file,
    save_directory,
)
from swiftmoe_lightning.engine.checkpoint_files import FileSlice, check_file, check_records, save_whole
from tests.helpers import rank_errors, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MOMENTS = 60
META = {"epoch": 3, "callbacks": {"best": torch.arange(7.0)}}


def flip_a_bit(data: bytearray, position: int) -> None:
    data[position] ^= 1 << position % 8


def clear_a_sector(data: bytearray, position: int) -> None:
    data[position : position + 512] = bytes(len(data[position : position + 512]))


def cut_off(data: bytearray, position: int) -> None:
    del data[position:]


def damaged(path: Path, damage: Callable[[bytearray, int], None], seed: int) -> Any:
    """`path` with one damage after the other; each time the place."""
    whole = path.read_bytes()
    for place in random.Random(seed).choices(range(len(whole)), k=MOMENTS):
        data = bytearray(whole)
        damage(data, place)
        path.write_bytes(data)
        yield place
    path.write_bytes(whole)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = sml.MoE(4, 3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    return module, optimizer


DAMAGES = pytest.mark.parametrize("damage", [flip_a_bit, clear_a_sector, cut_off])


@DAMAGES
def test_a_damaged_file_is_an_error_or_harmless(damage: Any, tmp_path: Path) -> None:
    module, optimizer = stepped()
    saved = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "names": ["a", 1, None]}
    path = tmp_path / "run.ckpt"
    save_whole(saved, path)
    actual = 0
    for place in damaged(path, damage, seed=1):
        try:
            assert equal(read_file(path), saved), place
        except ValueError as error:
            assert f"cannot read the checkpoint '{path}'" in str(error)  # noqa: PT017
            actual += 1
    assert actual > MOMENTS // 4
    assert equal(read_file(path), saved)


def load(path: Path) -> Any:
    """All that a directory gives back, into a model and an optimizer that know nothing of it."""
    module = sml.MoE(4, 3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    meta = load_meta(path)
    load_model(path, module)
    load_optimizers(path, module, [optimizer])
    return meta, module.state_dict(), optimizer.state_dict()


@DAMAGES
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
def test_a_damaged_directory_is_an_error_or_harmless(name: str, damage: Any, tmp_path: Path) -> None:
    module, optimizer = stepped()
    path = tmp_path / "run.ckpt"
    save_directory(path, module, [optimizer], META)
    expected = META, module.state_dict(), optimizer.state_dict()
    actual = 0
    for place in damaged(path / name, damage, seed=2):
        try:
            assert all(map(equal, load(path), expected)), place
        except ValueError as error:
            assert f"cannot read the checkpoint '{path}'" in str(error)  # noqa: PT017
            actual += 1
    assert actual > MOMENTS // 4
    assert all(map(equal, load(path), expected))


def flip_in(path: Path, part: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(part)] ^= 4
    path.write_bytes(data)


def test_the_damaged_record_is_named(tmp_path: Path) -> None:
    module, optimizer = stepped()
    path = tmp_path / "run.ckpt"
    save_directory(path, module, [optimizer], META)
    weights = module.experts.down_proj.detach().numpy().tobytes()  # type: ignore[union-attr]
    flip_in(path / "__0_0.distcp", weights)
    with pytest.raises(
        ValueError, match=r"'model\.experts\.down_proj' in __0_0\.distcp is damaged: its record '.*/data"
    ):
        load(path)
    flip_in(path / "meta.pt", META["callbacks"]["best"].numpy().tobytes())  # type: ignore[index]
    with pytest.raises(
        ValueError, match=r"meta\.pt is damaged: its record 'archive/data/0' does not hold .* \(Bad CRC-32"
    ):
        load(path)


def test_an_index_of_another_save_is_refused(tmp_path: Path) -> None:
    module, optimizer = stepped()
    for name in ("a.ckpt", "b.ckpt"):
        save_directory(tmp_path / name, module, [optimizer], META)
    (tmp_path / "a.ckpt/.metadata").write_bytes((tmp_path / "b.ckpt/.metadata").read_bytes())
    with pytest.raises(ValueError, match=r"\.metadata is damaged: its SHA-256 is not the one in meta\.pt"):
        load(tmp_path / "a.ckpt")


def test_a_directory_without_a_sum_of_its_index_loads(tmp_path: Path) -> None:
    module, optimizer = stepped()
    save_directory(tmp_path / "run.ckpt", module, [optimizer], META)
    torch.save(META, tmp_path / "run.ckpt/meta.pt")
    assert all(map(equal, load(tmp_path / "run.ckpt"), (META, module.state_dict(), optimizer.state_dict())))


def test_what_torch_writes_always_passes(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn):
        for shape in ((), (0,), (3,), (1000, 300)):
            torch.save({"a": torch.zeros(shape, dtype=dtype), "ä/b": 1}, path)
            assert check_file(path)
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    assert not check_file(path)
    assert read_file(path).equal(torch.ones(3))


def test_what_was_saved_without_sums_loads(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.ones(3), tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not check_file(tmp_path / "file.pt")
    assert read_file(tmp_path / "file.pt").equal(torch.ones(3))


def test_a_slice_is_read_and_checked_where_it_lies() -> None:
    one, other = io.BytesIO(), io.BytesIO()
    torch.save(torch.arange(5), one)
    torch.save(torch.arange(9), other)
    data = one.getvalue() + other.getvalue()
    file = io.BytesIO(data)
    piece = FileSlice(file, len(one.getvalue()), len(other.getvalue()))
    assert check_records(io.BufferedReader(piece), "second")
    assert FileSlice(file, 0, 7).read() == data[:7]
    assert piece.seek(-3, 2) == len(other.getvalue()) - 3
    assert piece.read() == data[-3:]
    damaged_data = bytearray(data)
    damaged_data[len(one.getvalue()) + 80] ^= 1
    with pytest.raises(ValueError, match="second is damaged"):
        check_records(io.BufferedReader(FileSlice(io.BytesIO(damaged_data), len(one.getvalue()), 10**9)), "second")


def save_on_ranks(path: str) -> None:
    module = nn.Linear(8, 8)
    engine = sml.SwiftMoEEngine(moe := nn.Sequential(module, sml.MoE(8, 6, 4)))
    assert engine.group is not None
    save_directory(path, moe, [], {})


def load_on_ranks(path: str) -> None:
    moe = nn.Sequential(nn.Linear(8, 8), sml.MoE(8, 6, 4))
    sml.SwiftMoEEngine(moe)
    load_meta(path)
    load_model(path, moe)


def test_damage_that_one_rank_reads_is_an_error_on_all(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run_ranks(save_on_ranks, 2, str(path))
    run_ranks(load_on_ranks, 2, str(path))
    shard = path / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[data.index(b"data/0") + 80] ^= 1
    shard.write_bytes(data)
    for error in rank_errors(load_on_ranks, 2, str(path)):
        # The other rank has read its own half.
        assert re.search(rf"cannot read the checkpoint '{path}' \(rank \d: [^;]*\)", error)
        assert "in __1_0.distcp is damaged: its record '" in error
