"""Seconds to save and to load a checkpoint, against torch's and Lightning's own; files that the page cache holds.

save_file       `WholeFileIO` (streamed, on disk before it returns, renamed) over Lightning's `TorchCheckpointIO`
load_file       the same two: with checksums over without
load_directory  with checksums over without
check_gb_per_s  GB/s of a file's check alone

Each ratio is our seconds over theirs, measured alternately in one process with one thread: below 1 we are faster. The
files lie in a temporary folder of the current folder, 0.5 GB unless sizes are given. Writes
benchmarks/results/NAME.json, and prints the ratios.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn

from benchmarks.common.command_line import add_settings, command_line, setting, settings_of
from benchmarks.common.interleaved import interleaved, seconds_of
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.common.spread import paired_ratio, spread
from swiftmoe_lightning import MoE
from swiftmoe_lightning.engine import safe_reader
from swiftmoe_lightning.engine.checkpoint import load_model, save_directory
from swiftmoe_lightning.engine.checkpoint_files import check_file
from swiftmoe_lightning.strategies.checkpoint_io import WholeFileIO

_WARM_UP: Final = 2
_GIGA: Final = 1e9


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model, whose expert weights are float32, and the number of measurements."""

    layers: int = setting(4, "MoE layers")
    dim: int = setting(1024, "model dim")
    hidden_dim: int = setting(640, "hidden dim of an expert")
    experts: int = setting(16, "experts of a layer")
    pairs: int = setting(5, "pairs of a ratio: two measurements of ours over two of theirs")


def compare(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> dict[str, Any]:
    """Seconds of both, measured alternately, and the ratio of ours to theirs."""
    ours_s, theirs_s = interleaved(lambda: seconds_of(ours), lambda: seconds_of(theirs), pairs, _WARM_UP)
    return {"ours_s": spread(ours_s), "theirs_s": spread(theirs_s), "ratio": paired_ratio(ours_s, theirs_s)}


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """All that this module's docstring lists, and the file's size."""
    module = nn.ModuleList(MoE(sizes.dim, sizes.hidden_dim, sizes.experts) for _ in range(sizes.layers))
    state = {"state_dict": dict(module.state_dict())}
    ours, theirs, file, directory = WholeFileIO(), TorchCheckpointIO(), folder / "run.ckpt", folder / "directory.ckpt"

    def load_unchecked() -> None:
        with mock.patch.object(safe_reader, "check_slice", return_value=True):
            load_model(directory, module)

    save_file = compare(
        lambda: ours.save_checkpoint(state, file), lambda: theirs.save_checkpoint(state, file), sizes.pairs
    )
    gigabytes = file.stat().st_size / _GIGA
    load_file = compare(lambda: ours.load_checkpoint(file), lambda: theirs.load_checkpoint(file), sizes.pairs)
    check_gb_per_s = spread([gigabytes / seconds_of(lambda: check_file(file)) for _ in range(2 * sizes.pairs)])
    file.unlink()
    save_directory(directory, module, [], {})
    return {
        "gigabytes": gigabytes,
        "save_file": save_file,
        "load_file": load_file,
        "check_gb_per_s": check_gb_per_s,
        "load_directory": compare(lambda: load_model(directory, module), load_unchecked, sizes.pairs),
    }


def print_table(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    print(f"{results['gigabytes']:.3f} GB")
    print(f"{'':15} {'ours, s':>9} {'theirs, s':>9} {'ratio':>6} {'its 95 % interval':>18}")
    for name in ("save_file", "load_file", "load_directory"):
        ours, theirs, ratio = (results[name][key] for key in ("ours_s", "theirs_s", "ratio"))
        interval = f"{ratio['low']:.2f}..{ratio['high']:.2f}"
        print(f"{name:15} {ours['median']:9.3f} {theirs['median']:9.3f} {ratio['median']:6.2f} {interval:>18}")
    print(f"a file's check alone: {results['check_gb_per_s']['median']:.2f} GB/s")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("checkpoints", __doc__)
    add_settings(parser, Sizes)
    arguments = parser.parse_args(argv)
    sizes = settings_of(arguments, Sizes)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    provenance = collect_provenance()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        results = {"sizes": asdict(sizes), **measure(Path(folder), sizes)}
    print_table(results)
    print(f"written to {write_result(arguments.name, provenance, results)}")


if __name__ == "__main__":
    main()
