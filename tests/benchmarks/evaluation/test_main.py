"""The benchmark on two ranks and tiny layers: what is sent and held, not how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.evaluation import __main__ as command
from benchmarks.evaluation.measure import Sizes, prompt

TINY = "--ranks 2 --layers 2 --dim 8 --hidden-dim 16 --experts 4 --tokens 3 --pairs 1 --name tiny"


def test_a_small_run_measures_everything(
    result: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(TINY.split())
    written = result("tiny")
    for routing in ("even", "zipf", "hot"):
        measured = written[routing]
        assert measured["ratio"]["median"] > 0
        assert measured["ms"].keys() == measured["sent_kib"].keys() == {"sharded", "placed"}
        # 2 ranks and 2 layers: 3 tokens of 8 elements there and back, and two ids and weights of each.
        assert measured["sent_kib"]["sharded"] == 2 * 2 * 3 * (8 + 8 + 4) * 4 / 1024
    # An expert has 3 * 8 * 16 elements. A rank has 3 slots, or half of 4 experts, in each layer.
    assert written["weights_mib"] == {"sharded": 2 * 2 * 384 * 4 / 2**20, "placed": 2 * 3 * 384 * 4 / 2**20}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["even", "zipf", "hot"]
    assert lines[-1].endswith("tiny.json")


def test_all_tokens_of_hot_routes_go_to_one_expert_first() -> None:
    _, ids_TK, _ = prompt(Sizes(tokens=50), "hot", rank=0)
    assert ids_TK.eq(0).sum(1).tolist() == [1] * 50


def test_one_rank_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--ranks", "1"])
    assert "--ranks must be 2 or more, got 1" in capsys.readouterr().err
