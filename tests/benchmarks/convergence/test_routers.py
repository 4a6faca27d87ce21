"""The model trains with every router, and its figures are such as the router promises."""

from __future__ import annotations

from benchmarks.convergence.routers import ROUTERS, measure
from tests.benchmarks.convergence.test_cluster import CORPUS, SETTING


def test_every_router_is_measured() -> None:
    figures = {router: measure(router, "static", SETTING, CORPUS) for router in ROUTERS}
    assert figures.pop("expert choice").imbalance == 1
    assert all(1 < row.imbalance <= SETTING.num_experts and 0 < row.loss < 8 for row in figures.values())
    assert figures["sinkhorn"].imbalance < figures["top-k"].imbalance
