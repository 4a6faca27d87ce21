"""What it costs that checkpoints are checked when they load, and on disk when they are saved; against torch, in turns.

One process, one thread, files that the page cache holds. python -m benchmarks.bench_checkpoints
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn

from benchmarks.provenance import birth_certificate, write_result
from benchmarks.spread import paired_ratio, spread
from swiftmoe_lightning import MoE
from swiftmoe_lightning.engine import safe_reader
from swiftmoe_lightning.engine.checkpoint import load_model, save_directory
from swiftmoe_lightning.engine.checkpoint_files import check_file
from swiftmoe_lightning.strategies.checkpoint_io import WholeFileIO

# 16 experts of 2 million values, 4 layers: 0.5 GB in float32.
_LAYERS, _DIM, _HIDDEN, _EXPERTS, _PAIRS = 4, 1024, 640, 16, 10
_GIGA: Final = 1e9


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], theirs: Callable[[], object]) -> dict[str, Any]:
    """Seconds of both, taken in turns, and the ratio of ours to theirs."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(_PAIRS + 2):
        for which in (0, 1) if i % 2 else (1, 0):
            seconds[which].append(timed((ours, theirs)[which]))
    kept = [values[2:] for values in seconds]
    return {"ours_s": spread(kept[0]), "theirs_s": spread(kept[1]), "ratio": paired_ratio(*kept)}


def measure(folder: Path) -> dict[str, Any]:
    module = nn.ModuleList(MoE(_DIM, _HIDDEN, _EXPERTS) for _ in range(_LAYERS))
    state = {"state_dict": dict(module.state_dict())}
    ours, theirs, file, directory = WholeFileIO(), TorchCheckpointIO(), folder / "run.ckpt", folder / "directory.ckpt"
    found = {
        "save_file": compare(lambda: ours.save_checkpoint(state, file), lambda: theirs.save_checkpoint(state, file))
    }
    size = file.stat().st_size / _GIGA
    found["load_file"] = compare(lambda: ours.load_checkpoint(file), lambda: theirs.load_checkpoint(file))
    found["check_gb_per_s"] = spread([size / timed(lambda: check_file(file)) for _ in range(_PAIRS)])
    file.unlink()
    save_directory(directory, module, [], {})

    def unchecked() -> None:
        with mock.patch.object(safe_reader, "check_slice", return_value=True):
            load_model(directory, module)

    found["load_directory"] = compare(lambda: load_model(directory, module), unchecked)
    return {"gigabytes": size, **found}


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    certificate = birth_certificate()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = measure(Path(folder))
    print(found)
    print(write_result("checkpoints", certificate, found))


if __name__ == "__main__":
    main()
