"""Many runs, side by side, each once: what is on disk is not run again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.common.provenance import collect_provenance
from benchmarks.convergence.corpus import Corpus, load_corpus
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.training import Run, train


@dataclass(frozen=True)
class Task:
    """One run that is wanted.

    Attributes:
        setting: what is trained.
        system: one of `SYSTEMS`.
        seed: of weights and data.
    """

    setting: Setting
    system: str
    seed: int

    def path(self, folder: Path) -> Path:
        """The file of its result."""
        return folder / self.setting.key / f"{self.system}-{self.seed}.json"


def run_all(tasks: Iterable[Task], folder: Path) -> Iterator[tuple[Task, Run]]:
    """Every task's run, those on disk first, the others as they end; as many side by side as there are cores.

    A run that is cut off leaves nothing behind, and is done anew the next time.

    Args:
        tasks: what is wanted.
        folder: for results, and the corpus.
    """
    missing = []
    for task in dict.fromkeys(tasks):
        if task.path(folder).exists():
            yield task, Run.load(task.path(folder))
        else:
            missing.append(task)
    if not missing:
        return
    for corpus in {task.setting.corpus for task in missing}:
        # Downloaded once, not by each process.
        load_corpus(corpus, folder / "corpus")
    provenance = collect_provenance()
    num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(_run, task, folder, provenance): task for task in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _run(task: Task, folder: Path, provenance: dict[str, object]) -> Run:
    run = train(task.setting, task.system, task.seed, _corpus(task.setting.corpus, folder / "corpus"))
    run.save(task.path(folder), task.setting, provenance)
    return run


@cache
def _corpus(name: str, folder: Path) -> Corpus:
    return load_corpus(name, folder)
