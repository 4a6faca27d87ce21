"""Runs that are killed at any moment, also while they save, go on from their last checkpoint as if nothing had been.

`python -m benchmarks.kills` does the same for longer.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from torch import Tensor

from tests.helpers import nightly, run_ranks
from tests.strategies.cases import assert_close
from tests.strategies.killed_run import WHERE, Kill, num_lost_steps, run_and_kill, train
from tests.strategies.sigterm_runs import assert_same_losses


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor]]:
    folder = str(tmp_path_factory.mktemp("whole"))
    return folder, run_ranks(train, 2, folder, False, init=False)[0]


@pytest.mark.parametrize("directory", [*nightly(False), True])
def test_killed_runs_resume_from_a_whole_checkpoint(
    directory: bool, uninterrupted: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """All ranks die, or one does, and then the other ends with an error."""
    moments = random.Random(int(directory))
    folder = str(tmp_path / "run")
    for rank, where in zip((0, 1, None), moments.sample(WHERE, 3), strict=True):
        death = run_and_kill(folder, directory, Kill(rank, where, moments.randrange(4), moments.random()))
        assert death.killed
        assert not death.hung
    for state in run_ranks(train, 2, folder, directory, init=False):
        assert_close(state, uninterrupted[1], 1e-9)
    assert num_lost_steps(folder) == 0
    assert_same_losses(folder, uninterrupted[0])
