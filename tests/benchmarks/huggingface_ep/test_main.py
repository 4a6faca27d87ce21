"""The benchmark on two ranks and a tiny model: that everything is measured, not how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.huggingface_ep import __main__ as command
from benchmarks.huggingface_ep.workload import DrawnRoutes

pytest.importorskip("transformers", minversion="5.24")

TINY = "--ranks 2 --ep-size 2 --pairs 1 --steps 1 --layers 1 --dim 16 --hidden-dim 16 --experts 4 --tokens 16"


@pytest.mark.nightly
def test_a_small_run_measures_everything(
    result: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([*TINY.split(), "--name", "tiny"])
    written = result("tiny")
    assert written.keys() == {"certificate", "sizes", "effort", "balanced", "zipf"}
    for routing in ("balanced", "zipf"):
        assert written[routing]["ratio"]["median"] > 0
        for measured in (written[routing]["peak_mib"], written[routing]["step_ms"]):
            assert measured.keys() == {"swiftmoe", "all_to_all"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == ["balanced", "zipf"]
    assert lines[-1].endswith("tiny.json")


def test_a_group_must_divide_ranks_and_experts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--experts", "6"])
    assert "--ep-size must be 2 or more and divide --ranks and --experts, got 4" in capsys.readouterr().err


def shares(routing: str) -> list[float]:
    logits_TE, ids_T1 = torch.zeros(20_000, 4), torch.zeros(20_000, 1, dtype=torch.long)
    _, _, drawn_T1 = DrawnRoutes(routing, seed=0)(None, None, (logits_TE, ids_T1, ids_T1))
    return (drawn_T1.flatten().bincount(minlength=4) / 20_000).sort(descending=True).values.tolist()


def test_experts_are_drawn_by_their_popularity() -> None:
    assert shares("balanced") == pytest.approx([1 / 4] * 4, abs=0.02)
    assert shares("zipf") == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.02)
