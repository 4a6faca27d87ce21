"""How the experts' products are cut into tiles: sizes by dtype and rows per slot, and which slot a row tile is of.

R rows, D model dim, F hidden dim, s slots, B row tiles. BM, BN: a program's tile of the result; BK: its step in depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.launch import shared_memory

INTERPRETED: Final = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tile:
    """One product's tile.

    Attributes:
        rows: BM.
        cols: BN.
        depth: BK.
        warps: of a program.
        stages: of the loads' pipeline.
        group: row tiles that share a weight panel in L2.
        split: column parts of the epilogue.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory that half precision takes, with some for results on their way out."""
        return 2 * self.stages * (self.rows + self.cols) * self.depth + 8 * 1024

    def arguments(self) -> dict[str, Any]:
        """What a kernel takes of it."""
        sizes = {"BM": self.rows, "BN": self.cols, "BK": self.depth, "GROUP": self.group}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class MlpTiles:
    """The tiles of one MLP. All but the weight gradients cut the rows alike, so one tile map serves them.

    Attributes:
        up: the first product's.
        down: the second product's.
        grad_hidden: the second product's backward to the hidden layer.
        grad_rows: the first product's backward to its rows.
        grad_weight: both matrices' gradients.
    """

    up: Tile
    down: Tile
    grad_hidden: Tile
    grad_rows: Tile
    grad_weight: Tile


# Registers bound these: the widest that do not spill on sm_90a, two or more stages deep in 227 KB of shared memory.
HALF_MANY: Final = MlpTiles(
    up=Tile(128, 256, 64, 8, 3, split=8),
    down=Tile(128, 128, 64, 4, 3),
    grad_hidden=Tile(128, 128, 64, 8, 3, group=16, split=4),
    grad_rows=Tile(128, 256, 64, 8, 3),
    grad_weight=Tile(128, 256, 64, 8, 6),
)
HALF_FEW: Final = MlpTiles(
    up=Tile(64, 128, 64, 4, 4, split=2),
    down=Tile(64, 128, 64, 4, 3),
    grad_hidden=Tile(64, 128, 64, 4, 3, split=4),
    grad_rows=Tile(64, 128, 64, 4, 3),
    grad_weight=Tile(128, 128, 32, 4, 6),
)
SINGLE: Final = MlpTiles(
    up=Tile(64, 64, 32, 4, 3),
    down=Tile(64, 64, 32, 4, 3),
    grad_hidden=Tile(64, 64, 32, 8, 3, split=2),
    grad_rows=Tile(64, 64, 32, 8, 3),
    grad_weight=Tile(64, 64, 32, 4, 5),
)
TENSOR_FLOAT: Final = MlpTiles(
    up=Tile(128, 128, 32, 8, 3, split=2),
    down=Tile(128, 128, 32, 8, 3),
    grad_hidden=Tile(128, 128, 32, 8, 3, split=4),
    grad_rows=Tile(128, 128, 32, 8, 3),
    grad_weight=Tile(128, 128, 32, 8, 5),
)
# Below this many rows per slot, most of a tile of 128 rows would be padding.
MANY_ROWS: Final = 96
# Bytes of shared memory that the tiles for many rows take at most; those for few take 97 KB.
MANY_SHARED: Final = 192 * 1024


def choose_tiles(x: Tensor, num_rows: int, num_slots: int) -> MlpTiles:
    """By what the CPU knows: dtype and device, and the mean of rows per slot, not each slot's own.

    Args:
        x: of the dtype and on the device.
        num_rows: R.
        num_slots: s.
    """
    if x.dtype == torch.float32:
        return SINGLE if dot_precision(x.dtype) == "ieee" else TENSOR_FLOAT
    many = num_rows >= MANY_ROWS * num_slots
    return HALF_MANY if many and shared_memory(x.device) >= MANY_SHARED else HALF_FEW


def dot_precision(dtype: torch.dtype) -> str:
    """How products of a dtype are taken: float32 as float32, unless `torch.set_float32_matmul_precision` allows less.

    Returns:
        "ieee" or "tf32".
    """
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True, eq=False)
class RowTiles:
    """Where the rows come from, whose they are and how they are cut.

    All tensors are on the device, and the CPU waits for none.

    Attributes:
        assignment_R: [R] int, row r is of token assignment_R[r] // top_k.
        top_k: K.
        ends_s: [s] int32, the end of each slot's rows. Rows from ends_s[-1] on are unassigned.
        slot_B: [B] int32, the slot of each row tile; s: no tile.
        first_row_B: [B] int32, the first row of each tile.
        num_tiles: [1] int32, how many of the B there are.
        num_rows: R.
        sizes: how the products cut them.
    """

    assignment_R: Tensor
    top_k: int
    ends_s: Tensor
    slot_B: Tensor
    first_row_B: Tensor
    num_tiles: Tensor
    num_rows: int
    sizes: MlpTiles


def cut_rows(assignment_R: Tensor, top_k: int, ends_s: Tensor, sizes: MlpTiles) -> RowTiles:
    """Cut the rows into tiles that no two slots share, without waiting: the CPU knows only a bound of their number.

    Args:
        assignment_R: [R] int, row r is of token assignment_R[r] // top_k.
        top_k: K.
        ends_s: [s] int32, the end of each slot's rows.
        sizes: how the products cut them.
    """
    num_rows, num_slots, block = len(assignment_R), len(ends_s), sizes.up.rows
    max_tiles = triton.cdiv(num_rows, block) + num_slots
    slot_B, first_row_B = (torch.empty(max_tiles, dtype=torch.int32, device=ends_s.device) for _ in range(2))
    num_tiles = torch.empty(1, dtype=torch.int32, device=ends_s.device)
    tile_map_kernel[(triton.cdiv(max_tiles, 32),)](
        ends_s,
        slot_B,
        first_row_B,
        num_tiles,
        num_slots,
        max_tiles,
        BM=block,
        SLOTS=triton.next_power_of_2(num_slots),
        TILES=32,
    )
    return RowTiles(assignment_R, top_k, ends_s, slot_B, first_row_B, num_tiles, num_rows, sizes)


@triton.jit
def tile_map_kernel(
    p_ends,  # *i32 [s]
    p_slot,  # *i32 [B], written
    p_first_row,  # *i32 [B], written
    p_num_tiles,  # *i32 [1], written
    num_slots,
    max_tiles,
    BM: tl.constexpr,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The slots and first rows of TILES row tiles; and, in the first program, how many tiles there are."""
    # [SLOTS]
    slots = tl.arange(0, SLOTS)
    ends = tl.load(p_ends + slots, mask=slots < num_slots, other=0)
    starts = tl.load(p_ends + slots - 1, mask=(slots > 0) & (slots < num_slots), other=0)
    tile_ends = tl.cumsum((ends - starts + BM - 1) // BM, 0)
    # [TILES, SLOTS]; the slots whose tiles all lie before this one.
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    passed = (tile_ends[None, :] <= tiles[:, None]) & (slots < num_slots)[None, :]
    slot = tl.sum(passed.to(tl.int32), 1)
    first_tile = tl.max(tl.where(passed, tile_ends[None, :], 0), 1)
    first_row = tl.max(tl.where(passed, ends[None, :], 0), 1) + (tiles - first_tile) * BM
    tl.store(p_slot + tiles, slot, mask=tiles < max_tiles)
    tl.store(p_first_row + tiles, first_row, mask=tiles < max_tiles)
    if tl.program_id(0) == 0:
        tl.store(p_num_tiles, tl.max(tile_ends, 0))


@triton.jit
def tile_of_program(program, num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """GROUP row tiles go through all columns together, so that what they load stays in L2."""
    group = program // (GROUP * num_col_tiles)
    place = program % (GROUP * num_col_tiles)
    height = min(num_row_tiles - group * GROUP, GROUP)
    return group * GROUP + place % height, place // height


@triton.jit
def rows_of_tile(p_first_row, row_tile, end, BM: tl.constexpr):
    """[BM] int64 rows of a tile, and whether each is before `end`; past it the first row again, safe to read."""
    first_row = tl.load(p_first_row + row_tile)
    offsets = tl.arange(0, BM)
    m_row = first_row + offsets < end
    return (first_row + tl.where(m_row, offsets, 0)).to(tl.int64), m_row


@triton.jit
def sources_of(rows, p_assignment, TOP_K: tl.constexpr):
    """[BM] int64: the token of each row, or the row itself if not gathered."""
    sources = rows
    if p_assignment is not None:
        sources = (tl.load(p_assignment + rows).to(tl.int32) // TOP_K).to(tl.int64)
    return sources


@triton.jit
def load_block(pointers, mask, MASKED: tl.constexpr):
    """Without a mask where none is needed: its registers and predicates are not free."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0)
    else:  # noqa: RET505 - one return per compile-time branch
        return tl.load(pointers)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """[BM, BK] @ [BK, BN] + [BM, BN], in float32."""
    # The interpreter multiplies bfloat16 as if it were integers.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def column_halves(b, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] -> the left and the right [BM, BN / 2]; a thread keeps what it holds."""
    return b.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
