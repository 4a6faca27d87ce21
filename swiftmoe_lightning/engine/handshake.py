"""The all-gather at the start of every layer's forward: counts, and a header by which ranks check their calls.

W ranks, E experts. A rank sends one row of int32 numbers: a `Header`, and then [E] counts, padded to the widest layer,
so that a rank that has left its evaluation loop can take part without knowing which layer the others run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from swiftmoe_lightning.config import TOKEN_DTYPES
from swiftmoe_lightning.distributed import ExpertGroup, HostCopy, to_device, to_host
from swiftmoe_lightning.engine.handshake_rows import DTYPES, Call, HandshakeTable, Header, LayerCall
from swiftmoe_lightning.modules import NON_FINITE_SCORES

_EQUAL_CALLS: Final = (
    "every rank must run the same MoE layers in the same order, as many times, in evaluation and in hooks, too (no "
    "forward under `if rank == 0:`): give all ranks equally many training batches (drop_last=True, or "
    "limit_train_batches). (FAQ: different-forwards)"
)


class ForwardHandshake:
    """Exchanges what each rank is about to do, and raises on all ranks if that differs.

    Args:
        group: this rank's expert group, whose ranks exchange their calls in every forward.
        layer_names: of all MoE layers, in the same order on every rank.
        max_experts: the widest layer's E.
        device: on which rows are gathered.
        token_dtype: as in `SwiftMoEConfig`.

    Attributes:
        num_updates: optimizer steps that this rank has made; ranks with different numbers train different models.
        wants_stop: set it on any rank, at any time.
        stops: True on all ranks after the same training forward, once one of them wants to stop. Other groups learn of
            it with the next optimizer step.
    """

    def __init__(
        self,
        group: ExpertGroup,
        layer_names: Sequence[str],
        max_experts: int,
        device: torch.device,
        token_dtype: str | None = None,
    ) -> None:
        self._group, self._names, self._max_experts, self._device = group, layer_names, max_experts, device
        self._token_dtype = 0 if token_dtype is None else 1 + TOKEN_DTYPES.index(token_dtype)
        self.num_updates = 0
        self._stops_of_groups: HostCopy | None = None
        self.reset_stop()

    def reset_stop(self) -> None:
        """Forget that anyone wants to stop."""
        self.wants_stop = self.stops = self._group_stops = False

    def end_update(self) -> None:
        """Count an optimizer step, and begin to tell other groups whether this one wants to stop."""
        self.num_updates += 1
        if self._group.replicate is not None:
            (stops,) = to_device(self._device, np.array([self._group_stops], np.int32))
            self._stops_of_groups = HostCopy(self._device, self._group.replicate.start_all_gather(stops).wait)

    def start(self, call: LayerCall, counts_E: Tensor, scores_finite: Tensor) -> Callable[[], HandshakeTable]:
        """Announce the forward of a layer. Errors are raised on all ranks, by what it returns.

        Args:
            call: what the host knows of it.
            counts_E: [E] int32, this rank's assignments to each expert.
            scores_finite: [] bool, whether the router's scores are.

        Returns:
            What waits for the rows of all ranks, and checks them.

        Raises:
            RuntimeError: when ranks make different calls or have made different numbers of optimizer steps.
            FloatingPointError: for non-finite scores.
        """
        head = self._row_without_counts(call.layer, torch.is_grad_enabled())[: Header.FINITE]
        head[Header.DTYPE], head[Header.SHARDED] = DTYPES.index(call.dtype), call.sharded
        head[Header.STALE], head[Header.STOP] = call.stale, self.wants_stop
        head[Header.TOKENS], head[Header.TOP_K] = call.shape_TK
        padding = np.zeros(self._max_experts - len(counts_E), np.int32)
        head_on_device, padding_on_device = to_device(self._device, head, padding)
        return self._start(
            torch.cat([head_on_device, scores_finite.view(1).to(torch.int32), counts_E, padding_on_device])
        )

    def done(self) -> HandshakeTable:
        """Announce that this rank has no more batches. Returns what the others are about to do.

        Raises:
            RuntimeError: as `start` says.
            FloatingPointError: as `start` says.
        """
        return self._gather(self._without_counts(Call.DONE, trains=False))

    def call_dense(self, trains: bool) -> None:
        """Announce that this rank is about to gather the weights of the dense part.

        Raises:
            RuntimeError: as `start` says.
        """
        self._gather(self._without_counts(Call.DENSE, trains))

    def begin_epoch(self, num_batches: int) -> list[int]:
        """Announce a training epoch of `num_batches`.

        Returns:
            The number of every rank, also of other groups, in rank order.

        Raises:
            RuntimeError: as `start` says.
        """
        row = self._without_counts(Call.EPOCH, trains=True)
        row[len(Header)] = min(num_batches, torch.iinfo(row.dtype).max)
        rows = self._gather(row).rows
        if self._group.replicate is not None:
            # The other groups have made the same call, or they would not train an epoch.
            rows = to_host(self._group.all_gather(row))
        num_batches_W: list[int] = rows[:, len(Header)].tolist()
        return num_batches_W

    def _row_without_counts(self, call: int, trains: bool) -> np.ndarray:
        row = np.zeros(len(Header) + self._max_experts, np.int32)
        row[Header.CALL], row[Header.TRAINS], row[Header.FINITE] = call, trains, True
        row[Header.UPDATES], row[Header.TOKEN_DTYPE] = self.num_updates, self._token_dtype
        return row

    def _without_counts(self, call: Call, trains: bool) -> Tensor:
        return to_device(self._device, self._row_without_counts(call, trains))[0]

    def _gather(self, row: Tensor) -> HandshakeTable:
        return self._start(row)()

    def _start(self, row: Tensor) -> Callable[[], HandshakeTable]:
        with self._explain_failure(row):
            copy = HostCopy(self._device, self._group.expert.start_all_gather(row).wait)
        return partial(self._finish, row, copy)

    @contextmanager
    def _explain_failure(self, row: Tensor) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()} {self._describe(to_host(row))}, and the other ranks did not follow: "
                f"{error}. If another rank raised an error of its own, that one comes first. Else: {_EQUAL_CALLS}"
            ) from error

    def _finish(self, row: Tensor, copy: HostCopy) -> HandshakeTable:
        with self._explain_failure(row):
            table = HandshakeTable(copy.wait())
        self._check(table)
        self._group_stops |= table.any_stop
        if self._group.replicate is None:
            self.stops = self._group_stops
        elif self._stops_of_groups is not None and table.all_train:
            self.stops |= bool(self._stops_of_groups.wait().any())
            self._stops_of_groups = None
        return table

    def _check(self, table: HandshakeTable) -> None:
        ranks = self._group.expert.ranks
        calls = {tuple(head) for head in table.active_rows[:, : Header.SHARDED + 1].tolist()}
        has_left = len(table.active_rows) < len(table.rows)
        if len(calls) > 1 or (has_left and any(training or call == Call.DENSE for call, training, *_ in calls)):
            raise RuntimeError(
                "ranks are in different forward passes: "
                + "; ".join(f"rank {rank} {self._describe(row)}" for rank, row in zip(ranks, table.rows, strict=True))
                + f"; {_EQUAL_CALLS}"
            )
        updates_W = table.rows[:, Header.UPDATES].tolist()
        if len(set(updates_W)) > 1:
            raise RuntimeError(
                f"ranks have made different numbers of optimizer steps ({', '.join(map(str, updates_W))}, by rank), "
                "and train different models from here on. Step on all ranks or on none: a rank's own gradients of "
                "experts are of its rows alone, so decide by engine.grad_norm(), which is the same on all. "
                "(FAQ: different-steps)"
            )
        token_dtypes = [(None, *TOKEN_DTYPES)[index] for index in table.rows[:, Header.TOKEN_DTYPE]]
        if len(set(token_dtypes)) > 1:
            raise RuntimeError(
                "ranks send tokens in different numbers: "
                + ", ".join(f"rank {rank} has token_dtype={d!r}" for rank, d in zip(ranks, token_dtypes, strict=True))
                + ". Give all ranks the same settings. (FAQ: different-settings)"
            )
        bad_ranks = [rank for rank, is_finite in zip(ranks, table.rows[:, Header.FINITE], strict=True) if not is_finite]
        if bad_ranks:
            where = f"layer {self._names[table.layer]!r} on rank{'s' * (len(bad_ranks) > 1)} {bad_ranks}"
            raise FloatingPointError(NON_FINITE_SCORES.format(where=where))

    def _describe(self, row: np.ndarray) -> str:
        verb = "trains" if row[Header.TRAINS] else "evaluates"
        match row[Header.CALL]:
            case Call.DONE:
                return "has no more batches"
            case Call.EPOCH:
                return "begins a training epoch"
            case Call.DENSE:
                return f"{verb} and gathers the dense weights"
            case layer:
                how = " with sharded experts" * int(row[Header.SHARDED])
                return f"{verb} layer {self._names[layer]!r} in {DTYPES[row[Header.DTYPE]]}{how}"
