"""Records the loads and placements of every MoE layer and step in one file. U steps, W ranks, L layers, E experts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Final

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from swiftmoe_lightning.analysis.write_trace import FORMAT_VERSION, check_writable, partial_file, writer_for
from swiftmoe_lightning.config import check_coefficient
from swiftmoe_lightning.modules import LayerLoad, LoadReader

# A write is followed by a pause of at least so many times its own length.
_PAUSE: Final = 9


class PlacementRecorder(Callback):
    """Writes popularity and placements of a whole fit to an .npz file, for pictures and replays.

    Rank 0 writes it over any file of an earlier fit: after the first step, now and then while training goes on, and
    when it ends or breaks off. No step waits for a write, and who reads the file always finds a whole one.
    `np.load(path)` gives, one row an optimizer step (a layer that a step did not use has zeros there):

    `counts`    [U, W, L, E] int64, assignments of each rank's tokens for each expert
    `replicas`  [U, L, E] int64, slots of each expert
    `loads`     [U, L, W] int64, assignments that each rank computed
    `dropped`   [U, L] int64, assignments over capacity
    `moved`     [U, L] int64, (rank, expert) pairs that were not there a step before
    `step`      [U] int64, `trainer.global_step` after the step
    `metadata`  [] str, JSON: `format_version`, `layers` (names of the `Experts` modules, in the order of L),
                `world_size`, `slots_per_rank`, `capacity_factor` (of the first layer; null if it drops nothing),
                `finished` (whether training has ended or broken off)

    A path that ends in .parquet gets `counts` alone, as a table with the columns `step`, `layer`, `rank`, `expert` and
    `count` (see `write_parquet`). `swiftmoe_lightning.analysis.read_trace` reads both.

    Works with any strategy; under `strategy="swiftmoe"` the numbers are those of all ranks. A fit without a single
    step writes nothing.

    Args:
        path: the file; its folder is made.
        write_every_n_seconds: the pause between two writes while training goes on. It is longer where a write takes
            long, so that they take a tenth of the time at most, in a thread of rank 0. A write needs the recording's
            memory once more.

    Raises:
        OSError: for a path that cannot be written.
        ImportError: for a .parquet path without pyarrow.
        ValueError: for a write_every_n_seconds that is no number of 0 or more; when training starts, for a module
            without MoE layers or with layers of different E.
    """

    def __init__(self, path: str | Path, write_every_n_seconds: float = 30.0) -> None:
        check_coefficient(write_every_n_seconds=write_every_n_seconds)
        self.path = Path(path)
        # A bad path or a missing library is an error now, not at the end of the training.
        check_writable(self.path)
        check_writable(partial_file(self.path))
        self._write_file = writer_for(self.path)
        self._reader: LoadReader | None = None
        self._rows: list[_Row] = []
        self._step = 0
        self._writer = _BackgroundWriter(write_every_n_seconds)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reader = LoadReader(pl_module)
        sizes = reader.num_experts
        if not sizes:
            raise ValueError(f"PlacementRecorder found no MoE layer in {type(pl_module).__name__}: leave it out.")
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"PlacementRecorder keeps layers of one number of experts in one table, got {sizes}. Give all layers "
                "the same num_experts, or use ExpertPopularityMonitor."
            )
        self._rows, self._step = [], trainer.global_step
        # All ranks read the same numbers, so rank 0 alone keeps them.
        self._reader = reader if trainer.is_global_zero else None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._reader is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if loads := self._reader.read():
            self._rows.append(_Row(self._step, list(self._reader.num_experts.items()), loads))
            if self._writer.is_due:
                layers = list(self._reader.num_experts)
                self._writer.start(partial(self._write, layers, list(self._rows), finished=False))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish()

    def _finish(self) -> None:
        rows, reader = self._rows, self._reader
        self._rows, self._reader = [], None
        if reader is None or not rows:
            return
        self._writer.wait()
        self._write(list(reader.num_experts), rows, finished=True)

    def _write(self, layers: list[str], rows: list[_Row], finished: bool) -> None:
        metadata = {
            "format_version": FORMAT_VERSION,
            "layers": layers,
            "world_size": rows[0].world_size,
            "slots_per_rank": rows[0].slots_per_rank,
            "capacity_factor": rows[0].capacity_factor,
            "finished": finished,
        }
        arrays = {
            "counts": np.stack([row.counts_WLE for row in rows]),
            "replicas": np.stack([row.replicas_LE for row in rows]),
            "loads": np.stack([row.loads_LW for row in rows]),
            "dropped": np.stack([row.dropped_L for row in rows]),
            "moved": np.stack([row.moved_L for row in rows]),
            "step": np.array([row.step for row in rows], dtype=np.int64),
        }
        self._write_file(self.path, arrays, metadata)


class _Row:
    """One step of all layers. layers: (name, E), in the order of L; loads: those that the step used."""

    def __init__(self, step: int, layers: list[tuple[str, int]], loads: dict[str, LayerLoad]) -> None:
        first = next(iter(loads.values()))
        placement, self.capacity_factor = first.placement, None if first.capacity is None else first.capacity.factor
        self.step, self.world_size, self.slots_per_rank = step, placement.world_size, placement.slots_per_rank
        num_layers, num_experts = len(layers), layers[0][1]
        self.counts_WLE = np.zeros((self.world_size, num_layers, num_experts), dtype=np.int64)
        self.replicas_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.loads_LW = np.zeros((num_layers, self.world_size), dtype=np.int64)
        self.dropped_L = np.zeros(num_layers, dtype=np.int64)
        self.moved_L = np.zeros(num_layers, dtype=np.int64)
        for index, (name, _) in enumerate(layers):
            if name in loads:
                load = loads[name]
                self.counts_WLE[:, index] = load.counts_WE
                self.replicas_LE[index] = load.replica_counts_E
                self.loads_LW[index] = load.load_W
                self.dropped_L[index] = load.num_dropped_tokens
                self.moved_L[index] = load.num_moved


class _BackgroundWriter:
    """Writes now and then, in a thread.

    Args:
        pause_s: seconds from the end of a write to the start of the next, at least.
    """

    def __init__(self, pause_s: float) -> None:
        self._pause_s, self._next_start = pause_s, 0.0
        self._thread: Thread | None = None

    @property
    def is_due(self) -> bool:
        """Whether the last write is done, and the pause after it is over."""
        is_writing = self._thread is not None and self._thread.is_alive()
        return not is_writing and time.monotonic() >= self._next_start

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in a thread. Where it fails, training goes on with a warning."""
        self._thread = Thread(target=self._run, args=(write,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for a write that has begun."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, write: Callable[[], None]) -> None:
        start = time.monotonic()
        try:
            write()
        except Exception as error:
            rank_zero_warn(f"PlacementRecorder could not write, and will try again: {error!r}")
        end = time.monotonic()
        self._next_start = end + max(self._pause_s, _PAUSE * (end - start))
