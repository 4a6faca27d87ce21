"""Every layer's forward begins with one all-gather: counts, and a header that keeps ranks from mixing different calls.

W ranks, E experts. A row is [layer, _DENSE, _EPOCH or _DONE, training, dtype, stale, finite, stop, updates] and then
[E] counts, padded to the widest layer, so that a rank which has left its evaluation loop can answer without knowing
which layer others are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import ExpertGroup
from swiftmoe_lightning.modules import NON_FINITE_SCORES

_HEADER: Final = 7
_DONE: Final = -1
_DENSE: Final = -2
_EPOCH: Final = -3
_SAME_STEPS: Final = (
    "every rank must run the same MoE layers in the same order, as many times, in evaluation and in hooks, too (no "
    "forward under `if rank == 0:`): give all ranks equally many training batches (drop_last=True, or "
    "limit_train_batches)."
)
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ForwardHandshake:
    """What the ranks tell each other at the start of a layer's forward.

    layer_names: of all MoE layers, in the same order on every rank. max_experts: the widest layer's E.

    num_updates: optimizer steps that this rank has made; ranks that differ would train different models.
    wants_stop: set it on any rank, at any time; `stops` is then True on all ranks after the same training forward.
    """

    def __init__(self, group: ExpertGroup, layer_names: Sequence[str], max_experts: int, device: torch.device) -> None:
        self._group, self._names, self._max_experts, self._device = group, layer_names, max_experts, device
        self.wants_stop = self.stops = False
        self.num_updates = 0

    def call(
        self, layer: int, counts_E: Tensor, scores_finite: Tensor, dtype: torch.dtype, stale: bool
    ) -> HandshakeRows:
        """Say what this rank is about to do. Returns what all do, checked.

        Raises RuntimeError when ranks are in different calls or have made different numbers of optimizer steps,
        FloatingPointError for non-finite scores; on all ranks.
        """
        head = [layer, int(torch.is_grad_enabled()), DTYPES.index(dtype), int(stale)]
        padding = counts_E.new_zeros(self._max_experts - len(counts_E))
        flags = [scores_finite.view(1).to(torch.int64), counts_E.new_tensor([int(self.wants_stop), self.num_updates])]
        row = torch.cat([counts_E.new_tensor(head), *flags, counts_E, padding])
        return self._gather(row)

    def done(self) -> HandshakeRows:
        """Say that this rank has no more batches, and hear what the others are about to do."""
        return self._gather(self._row_without_counts(_DONE, trains=False))

    def call_dense(self, trains: bool) -> None:
        """Say that this rank is about to gather the weights of the dense part. Raises RuntimeError as `call` does."""
        self._gather(self._row_without_counts(_DENSE, trains))

    def begin_epoch(self, num_batches: int) -> list[int]:
        """Say that this rank begins to train that many batches. Returns what all say. Raises RuntimeError as `call`."""
        row = self._row_without_counts(_EPOCH, trains=True)
        row[_HEADER] = num_batches
        told: list[int] = self._gather(row).table[:, _HEADER].tolist()
        return told

    def _row_without_counts(self, call: int, trains: bool) -> Tensor:
        row = torch.zeros(_HEADER + self._max_experts, dtype=torch.int64, device=self._device)
        row[:_HEADER] = torch.tensor([call, int(trains), 0, 0, 1, 0, self.num_updates])
        return row

    def _gather(self, row: Tensor) -> HandshakeRows:
        try:
            rows = HandshakeRows(self._group.all_gather(row).cpu().numpy())
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self._group.rank} {self._describe(row.cpu().numpy())}, and the other ranks did not follow: "
                f"{error}. If another rank raised an error of its own, that one comes first. Else: {_SAME_STEPS}"
            ) from error
        self._check(rows)
        self.stops |= rows.any_stop
        return rows

    def _check(self, rows: HandshakeRows) -> None:
        calls = {tuple(head) for head in rows.active[:, :3].tolist()}
        has_left = len(rows.active) < len(rows.table)
        if len(calls) > 1 or (has_left and any(training or call == _DENSE for call, training, _ in calls)):
            raise RuntimeError(
                "ranks are in different forward passes: "
                + "; ".join(f"rank {rank} {self._describe(row)}" for rank, row in enumerate(rows.table))
                + f"; {_SAME_STEPS}"
            )
        updates_W = rows.table[:, 6].tolist()
        if len(set(updates_W)) > 1:
            raise RuntimeError(
                f"ranks have made different numbers of optimizer steps ({', '.join(map(str, updates_W))}, by rank), "
                "and train different models from here on. Step on all ranks or on none: a rank's own gradients of "
                "experts are of its rows alone, so decide by engine.grad_norm(), which is the same on all."
            )
        bad_ranks = np.flatnonzero(rows.table[:, 4] == 0).tolist()
        if bad_ranks:
            where = f"layer {self._names[rows.layer]!r} on rank{'s' * (len(bad_ranks) > 1)} {bad_ranks}"
            raise FloatingPointError(NON_FINITE_SCORES.format(where=where))

    def _describe(self, row: np.ndarray) -> str:
        if row[0] == _DONE:
            return "has no more batches"
        verb = "trains" if row[1] else "evaluates"
        if row[0] == _EPOCH:
            return "begins a training epoch"
        if row[0] == _DENSE:
            return f"{verb} and gathers the dense weights"
        return f"{verb} layer {self._names[row[0]]!r} in {DTYPES[row[2]]}"


class HandshakeRows:
    """table: [W, header + E] int64, what every rank said."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.active = table[table[:, 0] != _DONE]

    @property
    def layer(self) -> int:
        return int(self.active[0, 0])

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[int(self.active[0, 2])]

    @property
    def any_stale(self) -> bool:
        return bool(self.table[:, 3].any())

    @property
    def any_stop(self) -> bool:
        """Whether a rank wants to stop, and all are in training."""
        return bool(self.table[:, 1].all() and self.table[:, 5].any())

    def counts_WE(self, num_experts: int) -> np.ndarray:
        """[W, E] int64."""
        return self.table[:, _HEADER : _HEADER + num_experts]
