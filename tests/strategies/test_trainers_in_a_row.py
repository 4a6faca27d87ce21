"""One module through several Trainers, as a notebook or a script of several phases has it."""

from __future__ import annotations

import pytest
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
