"""What ranks tell each other in a handshake: a row of int32 numbers each, a `Header` and then [E] counts.

W ranks, E experts.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import torch

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Header(IntEnum):
    """The columns in front of a row's counts.

    Attributes:
        CALL: the index of the layer that is about to run, or a `Call`.
        TRAINS: whether the forward needs gradients.
        DTYPE: of the rows that will be exchanged, as an index of `DTYPES`.
        SHARDED: whether it evaluates with a part of every expert on each rank.
        STALE: whether this rank's slots must be filled again.
        STOP: whether this rank wants to stop.
        UPDATES: how many optimizer steps this rank has made.
        TOKENS: how many tokens this rank has.
        TOP_K: K.
        TOKEN_DTYPE: the run's setting, as an index of `TOKEN_DTYPES`, counted from 1; 0 for None.
        FINITE: whether the router's scores are. Known to the device alone; the host knows those before.
    """

    CALL = 0
    TRAINS = 1
    DTYPE = 2
    SHARDED = 3
    STALE = 4
    STOP = 5
    UPDATES = 6
    TOKENS = 7
    TOP_K = 8
    TOKEN_DTYPE = 9
    FINITE = 10


class Call(IntEnum):
    """Values of `Header.CALL` for a rank that does not run a layer.

    Attributes:
        DONE: it has no more batches to evaluate.
        DENSE: it gathers the weights of the dense part.
        EPOCH: it begins to train an epoch.
    """

    DONE = -1
    DENSE = -2
    EPOCH = -3


class LayerCall(NamedTuple):
    """What a rank's host knows of the forward of a layer that is about to run.

    Attributes:
        layer: its index.
        dtype: of the rows that will be exchanged.
        sharded: whether it evaluates with a part of every expert on each rank.
        stale: whether this rank's slots must be filled again.
        shape_TK: this rank's tokens, and K.
    """

    layer: int
    dtype: torch.dtype
    sharded: bool
    stale: bool
    shape_TK: torch.Size


class HandshakeTable:
    """The rows of all ranks in one handshake.

    Attributes:
        rows: [W, header + E] int32.
        active_rows: the rows of ranks that are not done.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.active_rows = rows[rows[:, Header.CALL] != Call.DONE]

    @property
    def layer(self) -> int:
        """The index of the layer that the active ranks are about to run."""
        return int(self.active_rows[0, Header.CALL])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that will be exchanged."""
        return DTYPES[int(self.active_rows[0, Header.DTYPE])]

    @property
    def sharded(self) -> bool:
        """Whether the active ranks evaluate with a part of every expert on each rank."""
        return bool(self.active_rows[0, Header.SHARDED])

    @property
    def any_stale(self) -> bool:
        """Whether the slots of some rank must be filled again."""
        return bool(self.rows[:, Header.STALE].any())

    @property
    def all_train(self) -> bool:
        """Whether the forward of every rank needs gradients."""
        return bool(self.rows[:, Header.TRAINS].all())

    @property
    def any_stop(self) -> bool:
        """Whether some rank wants to stop while all train."""
        return self.all_train and bool(self.rows[:, Header.STOP].any())

    @property
    def tokens_W(self) -> list[int]:
        """[W], each rank's tokens."""
        tokens_W: list[int] = self.rows[:, Header.TOKENS].tolist()
        return tokens_W

    @property
    def top_k(self) -> int:
        """K, of the active ranks."""
        return int(self.active_rows[:, Header.TOP_K].max())

    def counts_WE(self, num_experts: int) -> np.ndarray:
        """[W, E] int64, E = `num_experts`: each rank's assignments to each expert."""
        return self.rows[:, len(Header) : len(Header) + num_experts].astype(np.int64)
