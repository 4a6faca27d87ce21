"""`swiftmoe memory`: a rank's memory by formula, as the guide shows it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swiftmoe_lightning.analysis import Cluster, ModelSizes, Workload
from swiftmoe_lightning.analysis.report.memory_table import memory_costs
from swiftmoe_lightning.cli import app
from tests.test_cli_scale import lines

PAGE = (Path(__file__).parent.parent / "docs" / "guides" / "big-models.md").read_text()
# An expert has 3 * 8 * 4 = 96 parameters, 192 bytes in bfloat16.
SMALL = ModelSizes(num_layers=5, num_experts=4, top_k=2, dim=8, hidden_dim=4, dense_parameters=1000)


def memory(*argv: str) -> Any:
    return CliRunner().invoke(app, ["memory", *argv])


def test_the_page_shows_what_the_command_prints() -> None:
    ((command, shown),) = re.findall(r"```\n\$ swiftmoe (memory .*?)\n(.*?)```", PAGE, flags=re.DOTALL)
    result = CliRunner().invoke(app, shlex.split(command))
    assert lines(result.stdout) == lines(shown), f"big-models.md: run swiftmoe {command}, and paste what it prints"


def test_two_ranks_need_what_is_worked_out_by_hand() -> None:
    costs = [cost for _, cost in memory_costs(SMALL, [Cluster(num_ranks=2)], Workload(tokens=16))]
    # max(ceil(1.25 * 4 / 2), 4 / 2 + 1) slots in each of 5 layers, or in 3.
    assert [cost.slot_bytes for cost in costs] == [5 * 3 * 192, 5 * 3 * 192, 3 * 3 * 192]
    # Half of 5 * 4 experts: parameter, gradient and two moments, 4 bytes each.
    assert [cost.state_bytes for cost in costs] == [16 * 10 * 96, 0, 0]
    assert [cost.host_bytes for cost in costs] == [0, 16 * 10 * 96, 16 * 10 * 96]
    # Of 2 layers the gradients of 3 slots, 3 experts sent and received; tokens; and from the CPU half of the experts.
    buffers = 2 * 3 * 192 + 2 * 2 * 3 * 192 + 2 * 16 * 2 * 8 * 2
    assert [cost.buffer_bytes for cost in costs] == [buffers, buffers + 2 * 2 * 192, buffers + 2 * 2 * 192]
    # Half of 3 experts goes to the other rank: gradients of 5 layers, and weights of 5, or of 5 and then of 4.
    assert [cost.group_bytes for cost in costs] == [10 * 1.5 * 192, 10 * 1.5 * 192, 14 * 1.5 * 192]
    assert [cost.messages for cost in costs] == [10, 10, 14]


def test_one_rank_computes_with_its_parameters_unless_they_are_elsewhere() -> None:
    costs = [cost for _, cost in memory_costs(SMALL, [Cluster(num_ranks=1)], Workload(tokens=16))]
    assert [cost.slot_bytes for cost in costs] == [0, 5 * 4 * 192, 3 * 4 * 192]
    assert [cost.state_bytes + cost.host_bytes for cost in costs] == [16 * 20 * 96] * 3
    assert costs[0].resident_bytes == 16 * (20 * 96 + 1000)
    assert [cost.group_bytes for cost in costs] == [0, 0, 0]


def test_micro_batches_fill_slots_again_and_wait_with_their_gradients() -> None:
    once, twice = (
        memory_costs(SMALL, [Cluster(num_ranks=2)], Workload(tokens=16, micro_batches=number))[-1][1]
        for number in (1, 2)
    )
    assert (once.fills, twice.fills) == (pytest.approx(9 / 5), pytest.approx(18 / 5))
    assert twice.buffer_bytes - once.buffer_bytes == 3 * 3 * 192


def test_json_has_the_bytes_of_a_model_of_30_billion_parameters() -> None:
    result = memory("qwen3-30b-a3b", "--json", "--ranks", "1,2,8")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = json.loads(result.stdout)
    assert [row["num_ranks"] for row in rows] == [1] * 3 + [2] * 3 + [8] * 3
    alone, offloaded, freed = rows[:3]
    # 48 layers of 128 experts of 3 * 2048 * 768 parameters.
    parameters = 48 * 128 * 3 * 2048 * 768
    assert alone["state_bytes"] == 16 * parameters == freed["host_bytes"]
    assert offloaded["slot_bytes"] == 2 * parameters
    assert freed["slot_bytes"] == 2 * parameters * 3 / 48
    assert [row["fits"] for row in rows] == [False, False, True, False, True, True, False, True, True]


def test_a_model_that_nobody_knows_is_one_line() -> None:
    result = memory("nowhere")
    assert result.exit_code == 2
    assert result.stderr.startswith("swiftmoe memory: there is no model nowhere.")
