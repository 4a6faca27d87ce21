"""A compiled module trains the same, and does not recompile from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import swiftmoe_lightning as sml
from tests.helpers import nightly, run_ranks
from tests.strategies.cases import Model, assert_close, loader, trainer, whole


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.count += 1
        return graph.forward


def fit_compiled(world_size: int, strategy: str, whole_module: bool) -> tuple[dict[str, Tensor], list[int]]:
    """End state of a fit of a compiled module, and how many graphs there were after each batch."""
    backend = Graphs()
    model = Model(aux_loss_coef=0.1, z_loss_coef=0.01)
    counts = []

    class Count(sml.ExpertPopularityMonitor):
        def on_train_batch_end(self, *args: Any) -> None:
            counts.append(backend.count)

    if not whole_module:
        model.moe = torch.compile(model.moe, backend=backend)  # type: ignore[assignment]
    compiled = torch.compile(model, backend=backend) if whole_module else model
    runner = trainer(world_size, strategy, callbacks=[Count()])
    runner.fit(compiled, loader(world_size), loader(world_size))  # type: ignore[arg-type]
    return whole(model), counts


@pytest.mark.parametrize("whole_module", [True, *nightly(False)])
def test_a_compiled_module_trains_the_same_without_recompiling_at_every_step(whole_module: bool) -> None:
    ((expected, expected_counts),) = run_ranks(fit_compiled, 1, 1, "auto", whole_module, init=False)
    for state, counts in run_ranks(fit_compiled, 2, 2, "swiftmoe", whole_module, init=False, timeout_s=120):
        assert_close(state, expected)
        assert counts[0] > 0
        # Lightning's own logging compiles again after the first validation, and on one process just the same.
        # Between ranks there are more graphs: exchanges lie between them.
        assert [count - counts[0] for count in counts] == [count - expected_counts[0] for count in expected_counts]
        assert counts[1] == counts[3]
        assert counts[4] == counts[-1]
