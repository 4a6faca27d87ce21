"""Checkpoints in the nodes' memory, with a second copy on another node: to go on after a lost rank or node.

W ranks.
"""

from __future__ import annotations

import copy
import os
import re
import secrets
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from swiftmoe_lightning.config import check_whole
from swiftmoe_lightning.distributed import FileMessage, HostGroup
from swiftmoe_lightning.engine.checkpoint import (
    META_FILE,
    causes_of,
    load_meta,
    load_model,
    load_optimizers,
    reading,
    seal_directory,
)
from swiftmoe_lightning.engine.checkpoint_files import discard, partial_path
from swiftmoe_lightning.engine.engine import SwiftMoEEngine
from swiftmoe_lightning.engine.group_factory import device_of_module
from swiftmoe_lightning.engine.safe_reader import SafeReader
from swiftmoe_lightning.placement import copy_ranks, plan_fetches

# What rank 0 writes of a directory: DCP's index, and all that is not cut over ranks.
_OF_ALL: Final = (".metadata", META_FILE)
# Names sort by steps. The token keeps apart what two starts of a run write for one step.
_NAME: Final = re.compile(r"\d{12}-[0-9a-f]{8}")
_PARTIAL: Final = partial_path(Path("name")).suffix


class MemoryCheckpoint:
    """The newest step of a run, in memory: each rank's part on its own node, and a copy of it on the next one.

    It lies in a folder of memory (tmpfs), so it outlives the ranks, and one node may be lost. What torchrun starts
    again goes on from there, at any number of ranks, without a file system that the nodes share. One save, in order:

    stage     this rank's shards of parameters and optimizer state -> CPU memory; then `save` returns
    write     -> a file in `folder`, behind the next steps, as torch.distributed.checkpoint writes directories
    copy      the file -> the next node's folder
    commit    when all ranks are done: the directory gets its name; then the one before it is removed

    In-memory checkpoints with copies on other machines are those of GEMINI (Wang et al., SOSP 2023).
    Construction is a collective, and so are all methods.

    Args:
        engine: whose module is saved, with placements and popularity.
        optimizers: of the module, prepared by the engine.
        folder: in memory (below /dev/shm), of this run alone. Ranks that see the same folder are one node.

    Raises:
        ValueError: without a process group.
        OSError: when a rank cannot make the folder, on all ranks.
    """

    def __init__(self, engine: SwiftMoEEngine, optimizers: Sequence[Optimizer], folder: str | os.PathLike[str]) -> None:
        self.engine, self.optimizers, self.folder = engine, list(optimizers), Path(folder)
        self._group = HostGroup(device_of_module(engine.module).type)
        self._group.together(lambda: self.folder.mkdir(mode=0o700, parents=True, exist_ok=True))
        status = self.folder.stat()
        nodes = self._group.gather((socket.gethostname(), status.st_dev, status.st_ino))
        # The first rank of each node makes, names and removes its directories.
        self._first_ranks = sorted(map(nodes.index, set(nodes)))
        self._node_W = [self._first_ranks.index(nodes.index(node)) for node in nodes]
        (self._token,) = self._group.broadcast([secrets.token_hex(4)])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="memory-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """Save after an optimizer step. Waits for the save before, and until this one is copied to the CPU.

        Args:
            step: steps that have been trained; must grow.
            extra: of plain types and tensors, returned by `load`; rank 0's is kept.

        Raises:
            OSError: when the save before could not be written, on all ranks. The one before that is still there.
        """
        check_whole(0, step=step)
        self.wait()
        module = self.engine.module
        state: dict[str, Any] = {"model": get_model_state_dict(module)}
        for i, optimizer in enumerate(self.optimizers):
            state[f"optimizer_{i}"] = get_optimizer_state_dict(module, optimizer)
        staged = BlockingAsyncStager().stage(state)
        meta = copy.deepcopy({"step": step, "extra": extra or {}, "engine": self.engine.state_dict()})
        self._pending = self._thread.submit(self._write, step, staged, meta)

    def wait(self) -> None:
        """Wait until the last save is whole. Call it before `destroy_process_group`.

        Raises:
            OSError: when it could not be written, on all ranks.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self) -> dict[str, Any] | None:
        """Go on from the newest step of which all parts are left on some node.

        Returns:
            `extra` of that save, and its "step"; None if there is no whole one.

        Raises:
            OSError: when it cannot be read, on all ranks.
            ValueError: when a part is damaged, or of a model with other shapes.
        """
        self.wait()
        tables = self._group.gather(self._group.together(self._find))
        of_nodes = [tables[rank] for rank in self._first_ranks]
        needed = {name: needs for table in of_nodes for name, (_, needs) in table.items() if needs}
        for name in sorted(needed, reverse=True):
            sizes = [table.get(name, ({}, []))[0] for table in of_nodes]
            fetches = plan_fetches(needed[name], [frozenset(files) for files in sizes])
            if fetches is not None:
                self._fetch(self.folder / name, [(*fetch, sizes[fetch[1]][fetch[0]]) for fetch in fetches])
                return self._read(self.folder / name)
        return None

    def _read(self, path: Path) -> dict[str, Any]:
        meta = self._group.together(lambda: load_meta(path))
        load_model(path, self.engine.module)
        load_optimizers(path, self.engine.module, self.optimizers)
        self.engine.load_state_dict(meta["engine"])
        self.engine.mark_stale()
        return {**meta["extra"], "step": meta["step"]}

    # -- one save, in a thread of its own -------------------------------------------------------------------------

    def _write(self, step: int, staged: dict[str, Any], meta: dict[str, Any]) -> None:
        final = self.folder / f"{step:012d}-{self._token}"
        partial = partial_path(final)
        try:
            self._on_first_ranks(lambda: self._begin(partial))
            writer = dcp.FileSystemWriter(partial, sync_files=False)
            dcp.save(staged, storage_writer=writer, process_group=self._group.process_group)
            self._write_of_all(partial, meta)
            self._copy_own_part(partial)
            # Only when all nodes have named the new directory does any node remove the one before it.
            self._on_first_ranks(lambda: partial.rename(final))
            self._on_first_ranks(lambda: self._discard_but(final))
        # Not the errors of a group that has lost a rank, which end the run.
        except (CheckpointException, OSError) as error:
            raise OSError(
                f"cannot keep the checkpoint of step {step} in memory, in {str(self.folder)!r} ({causes_of(error)}). "
                "What was there before still is. Make room there (a node holds its ranks' parts and another's, and "
                "twice that while it saves), or save to a disk. (FAQ: memory-checkpoint)"
            ) from error

    def _write_of_all(self, partial: Path, meta: dict[str, Any]) -> None:
        """What is not cut over ranks, from rank 0 to all nodes."""
        paths = [partial / name for name in _OF_ALL]

        def write_and_read() -> list[bytes]:
            if self._group.rank:
                return [b"" for _ in paths]
            seal_directory(partial, meta)
            return [path.read_bytes() for path in paths]

        contents = self._group.broadcast(self._group.together(write_and_read))

        def write() -> None:
            for path, content in zip(paths, contents, strict=True):
                if not path.exists():
                    path.write_bytes(content)

        self._on_first_ranks(write)

    def _copy_own_part(self, partial: Path) -> None:
        """This rank's file -> the next node, while another rank's file comes here."""
        # As DCP's writer names the file of a rank. A rank of which nothing is saved has none.
        paths = [partial / f"__{rank}_0.distcp" for rank in range(len(self._node_W))]
        own = paths[self._group.rank]
        sizes = self._group.gather(own.stat().st_size if own.exists() else 0)
        self._group.send_files(
            FileMessage(path, rank, path, to, size)
            for rank, (path, to, size) in enumerate(zip(paths, copy_ranks(self._node_W), sizes, strict=True))
            if to is not None and size
        )

    def _begin(self, partial: Path) -> None:
        # What kills and errors have left of other saves takes room.
        for path in self._directories():
            discard(partial_path(path))
        partial.mkdir()

    def _discard_but(self, final: Path) -> None:
        for path in self._directories():
            if path != final:
                discard(path)

    def _on_first_ranks(self, action: Callable[[], object]) -> None:
        self._group.together(lambda: action() if self._group.rank in self._first_ranks else None)

    # -- what is left, at a start ---------------------------------------------------------------------------------

    def _find(self) -> dict[str, tuple[dict[str, int], list[str]]]:
        """Directory -> its files' sizes here, and the names of all files that it needs, if its index is here."""
        found = {}
        for path in filter(Path.is_dir, self._directories()):
            sizes = {file.name: file.stat().st_size for file in path.iterdir()}
            needs: list[str] = []
            if _OF_ALL[0] in sizes:
                with reading(path):
                    stored = SafeReader(path).read_metadata().storage_data
                needs = sorted({place.relative_path for place in stored.values()} | set(_OF_ALL))
            found[path.name] = (sizes, needs)
        return found

    def _directories(self) -> list[Path]:
        """Every step's directory here, also where there is only the partial one. Files of others are left alone."""
        names = {path.name.removesuffix(_PARTIAL) for path in self.folder.iterdir()}
        return [self.folder / name for name in sorted(names) if _NAME.fullmatch(name)]

    def _fetch(self, path: Path, fetches: list[tuple[str, int, int, int]]) -> None:
        """Bring the files that nodes lack: (file, from node, to node, bytes)."""
        self._on_first_ranks(lambda: path.mkdir(exist_ok=True))
        # A file that a kill cuts off must not pass for a whole one.
        messages = [
            FileMessage(path / file, self._first_ranks[source], partial_path(path / file), self._first_ranks[to], size)
            for file, source, to, size in fetches
        ]
        self._group.send_files(messages)

        def name() -> None:
            for message in messages:
                if message.to == self._group.rank:
                    message.there.replace(message.path)

        self._group.together(name)
