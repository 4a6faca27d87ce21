"""Run functions on W gloo ranks, as torchrun would start them, and scripts: for tests and benchmarks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


class RankError(AssertionError):
    """At least one rank raised; `errors[rank]` is its traceback, or None."""

    def __init__(self, errors: list[str | None]) -> None:
        super().__init__("\n".join(f"--- rank {rank}:\n{e}" for rank, e in enumerate(errors) if e))
        self.errors = errors


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, init: bool = True, timeout_s: int = 60) -> list[Any]:
    """Call module-level `fn(*args)` in `world_size` processes of one thread each, where warnings are errors.

    Args:
        fn: not of a package's `__main__`, which processes do not import.
        init: start the default gloo group first. False leaves that to the function (a Trainer does it), with
            torchrun's environment set either way.
        timeout_s: seconds that the group waits in a collective. A rank that runs for twice as long is killed.

    Returns:
        What each rank returned, by rank. `torch.save` must be able to write it.

    Raises:
        RankError: with every rank's traceback if any rank raised.
        AssertionError: if one hung or died.
    """
    with TemporaryDirectory() as folder:
        with start_ranks(fn, world_size, *args, init=init, timeout_s=timeout_s, folder=folder) as ranks:
            for process in ranks:
                process.join(2 * timeout_s)
            hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        results = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        died = [rank for rank, path in enumerate(results) if not path.exists() and rank not in hung]
        outcomes = [torch.load(path, weights_only=False) if path.exists() else ("?", None) for path in results]
        if any(kind == "error" for kind, _ in outcomes):
            raise RankError([value if kind == "error" else None for kind, value in outcomes])
        assert not hung, f"ranks {hung} hung for {2 * timeout_s} s"
        assert not died, f"ranks {died} died without a word: {[ranks[r].exitcode for r in died]}"
        assert all(p.exitcode == 0 for p in ranks), [p.exitcode for p in ranks]
        return [value for _, value in outcomes]


@contextmanager
def start_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    init: bool = True,
    timeout_s: int = 60,
    folder: str | None = None,
) -> Iterator[list[Any]]:
    """The processes of `run_ranks`, which run until they end or the context does.

    folder: where outcomes go; None keeps them nowhere.
    """
    with TemporaryDirectory() as own:
        port = free_port()
        ranks = [
            _CONTEXT.Process(target=_rank_main, args=(fn, args, rank, world_size, port, folder or own, init, timeout_s))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.join()


def nightly(*cases: Any) -> list[Any]:
    """Cases of `pytest.mark.parametrize` that `make nightly` runs and `make test` leaves out: kin of some that stay."""
    values = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*each, marks=pytest.mark.nightly) for each in values]


def only_by_day(cases: Mapping[str, Any], *names: str) -> list[Any]:
    """The cases by name for `pytest.mark.parametrize`; all but the named ones are `nightly`.

    Args:
        cases: name -> case.
        *names: of those that `make test` runs, too.
    """
    assert cases.keys() >= set(names)
    return [
        pytest.param(case, id=name, marks=[] if name in names else pytest.mark.nightly) for name, case in cases.items()
    ]


def script_environment(**more: str) -> dict[str, str]:
    """The environment for a script that starts its own ranks, without this process's rank and port."""
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **more}


def run_script(*command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command that starts its own ranks, with `more` in its environment. It must succeed."""
    completed = subprocess.run(
        command, cwd=cwd, env=script_environment(**more), capture_output=True, text=True, timeout=120, check=False
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed


def rank_errors(fn: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> list[str]:
    """The tracebacks of all ranks of a call in which every rank must raise."""
    with pytest.raises(RankError) as caught:
        run_ranks(fn, world_size, *args, **options)
    missing = [rank for rank, error in enumerate(caught.value.errors) if error is None]
    assert not missing, f"ranks {missing} did not raise; the others: {caught.value}"
    return [error for error in caught.value.errors if error is not None]


def from_one_process(fn: Callable[..., Any], *args: Any) -> Any:
    """What module-level `fn(*args)` returns in a process that no launcher has started, as a notebook's kernel is."""
    return run_ranks(_forget_launcher, 1, fn, *args, init=False)[0]


def _forget_launcher(fn: Callable[..., Any], *args: Any) -> Any:
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]
    return fn(*args)


def _rank_main(
    fn: Callable[..., Any], args: Any, rank: int, world_size: int, port: int, folder: str, init: bool, timeout_s: int
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for ignored in _THIRD_PARTY_WARNINGS:
        warnings.filterwarnings("ignore", message=ignored)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
    }
    try:
        if init and world_size > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
            # A rank that ends, or raises, at once would close its connections while others still make theirs.
            dist.barrier()
        outcome = ("ok", fn(*args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    torch.save(outcome, f"{folder}/{rank}.partial")
    os.rename(f"{folder}/{rank}.partial", f"{folder}/{rank}.pt")
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    # A gloo worker thread that outlives the interpreter would abort the process.
    os._exit(0)


# Each is about code that is not ours, and names it.
_THIRD_PARTY_WARNINGS = (
    ".*does not have many workers.*",
    ".*num_workers.*",
    ".*isn't writing.*",
    ".*GPU available but not used.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*\\.grad attribute of a Tensor that is not a leaf Tensor.*",
    # torch's clipping of a parameter with one element beside DTensors, which Accelerate before 1.15 calls.
    "Found a non-scalar tensor with numel=1.*",
)


def _ports() -> Iterator[int]:
    """Ports below those that the system assigns; each test process begins at another one."""
    ports = range(10_000, 32_000)
    first = os.getpid() * 997 % len(ports)
    return cycle([*ports[first:], *ports[:first]])


_PORTS = _ports()


def free_port() -> int:
    """A free port that the system does not assign to others, so that it is still free when a group starts on it."""
    for port in _PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port")
