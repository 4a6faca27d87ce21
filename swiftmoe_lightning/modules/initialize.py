"""Random weights that do not depend on how they are cut, so that each rank draws only its own rows.

E experts; a block is up to 64 rows of one expert with a generator of its own.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_BLOCK_ROWS: Final = 64


def fill_rows_uniform(rows: Tensor, first_row: int, seed: int, bound: float) -> None:
    """Fill `rows` [E, r, ...], in place, with rows first_row.. of the U(-bound, bound) tensor of `seed`.

    Values depend on (seed, expert, row), the device type and the dtype; not on first_row or r.

    Args:
        rows: the part, [E, r, ...], of the full tensor, [E, all rows, ...].
        first_row: where in the full tensor the part begins.
        seed: of the full tensor, the same for each of its parts.
        bound: the largest absolute value.
    """
    generator = torch.Generator(rows.device)
    last_row = first_row + rows.shape[1]
    with torch.no_grad():
        for expert, expert_rows in enumerate(rows):
            for start in range(first_row // _BLOCK_ROWS * _BLOCK_ROWS, last_row, _BLOCK_ROWS):
                generator.manual_seed(_mix(seed, expert, start))
                block = torch.empty(_BLOCK_ROWS, *rows.shape[2:], dtype=rows.dtype, device=rows.device)
                block.uniform_(-bound, bound, generator=generator)
                top, bottom = max(start, first_row), min(start + _BLOCK_ROWS, last_row)
                expert_rows[top - first_row : bottom - first_row] = block[top - start : bottom - start]


def _mix(seed: int, expert: int, block: int) -> int:
    """One well-spread 63-bit seed from three small numbers (splitmix64's finaliser)."""
    value = (seed * 0x9E3779B97F4A7C15 + expert * 0xBF58476D1CE4E5B9 + block * 0x94D049BB133111EB) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor % 2**64
    return (value ^ (value >> 31)) % 2**63
