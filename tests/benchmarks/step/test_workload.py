"""Routes are drawn with fixed popularities, alike for every system, whatever models learn."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.step.workload import DrawnRouter, DrawnRoutes, Model, Sizes, Workload

SIZES = Sizes(layers=1, dim=32, hidden_dim=16, experts=4, top_k=1, tokens=16)


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


def shares(routing: str) -> list[float]:
    drawn_T1 = DrawnRoutes(Workload(SIZES, routing), 0).draw(20_000)
    return (drawn_T1.flatten().bincount(minlength=4) / 20_000).sort(descending=True).values.tolist()


def test_experts_are_drawn_by_their_popularity() -> None:
    assert shares("even") == pytest.approx([1 / 4] * 4, abs=0.02)
    assert shares("zipf") == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.02)


def test_popularity_moves_every_ten_steps_if_it_should() -> None:
    for routing, moves in (("zipf", False), ("moving", True)):
        routes = DrawnRoutes(Workload(SIZES, routing), 0)
        orders = []
        for _ in range(20):
            orders.append(routes.popularity_E().argsort().tolist())
            routes.draw(1)
        assert orders[:10] == [orders[0]] * 10
        assert orders[10:] == [orders[10]] * 10
        assert (orders[0] != orders[10]) is moves


def test_routes_do_not_depend_on_the_model_and_can_start_again() -> None:
    first, second = (DrawnRouter(Workload(SIZES, "zipf"), 0) for _ in range(2))
    x_TD = torch.randn(50, 32)
    ids = [router(scale * x_TD).expert_ids_TK.tolist() for router, scale in ((first, 1.0), (second, -3.0))]
    assert ids[0] == ids[1]
    assert first(x_TD).expert_ids_TK.tolist() != ids[0]
    first.routes.restart()
    assert first(x_TD).expert_ids_TK.tolist() == ids[0]


def test_weights_of_a_tokens_choices_are_a_softmax_of_their_scores() -> None:
    router = DrawnRouter(Workload(Sizes(layers=1, dim=32, experts=4, top_k=2), "even"), 0)
    routed = router(torch.randn(20, 32))
    probs_TK = routed.logits_TE.softmax(-1).gather(1, routed.expert_ids_TK)
    torch.testing.assert_close(routed.weights_TK, probs_TK / probs_TK.sum(-1, keepdim=True))


def test_models_of_a_workload_are_equal() -> None:
    first, second = (Model(Workload(SIZES, "even")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(first.batch_BT, second.batch_BT)
    assert first(first.batch_BT[:, :-1]).shape == (1, 16, 256)
