"""One module through several Trainers, as a notebook or a script of several phases has it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from tests.helpers import run_ranks
from tests.strategies.cases import Model, assert_close, loader, trainer, whole


def fit_in_a_row(world_size: int, *strategies: str) -> dict[str, Tensor]:
    model = Model()
    for strategy in strategies:
        trainer(world_size, strategy).fit(model, loader(world_size), loader(world_size))
    return whole(model)


def test_a_second_trainer_goes_on_from_the_first() -> None:
    (expected,) = run_ranks(fit_in_a_row, 1, 1, "auto", "auto", init=False)
    for state in run_ranks(fit_in_a_row, 2, 2, "swiftmoe", "swiftmoe", init=False):
        assert_close(state, expected)


def refuse_ddp_afterwards() -> None:
    with pytest.raises(RuntimeError, match="not by an optimizer that this engine prepared.* train on under"):
        fit_in_a_row(2, "swiftmoe", "ddp")


def test_a_trainer_that_would_leave_the_slots_behind_is_refused() -> None:
    run_ranks(refuse_ddp_afterwards, 2, init=False)


class StopAt(L.Callback):
    """As a signal would, on one rank alone."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 0:
            trainer.strategy.engine.request_stop()  # type: ignore[attr-defined]


def fit_after_a_stop() -> tuple[int, int]:
    model = Model()
    stopped = trainer(2, callbacks=[StopAt()])
    with pytest.raises(SIGTERMException):
        stopped.fit(model, loader(2), loader(2))
    second = trainer(2)
    second.fit(model, loader(2), loader(2))
    return stopped.global_step, second.global_step


def test_a_stop_ends_one_run_and_not_the_next() -> None:
    assert run_ranks(fit_after_a_stop, 2, init=False) == [(2, 8)] * 2
