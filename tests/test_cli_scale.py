from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swiftmoe_lightning.analysis import PRESETS
from swiftmoe_lightning.cli import app

PAGE = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
# A command, and what it prints.
SHOWN = re.findall(r"```\n\$ swiftmoe (scale .*?)\n(.*?)```", PAGE, flags=re.DOTALL)
BY_HAND = ("--layers", "2", "--experts", "4", "--top-k", "2", "--dim", "8", "--hidden-dim", "4")


def scale(*argv: str) -> Any:
    return CliRunner().invoke(app, ["scale", *argv])


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_the_page_shows_both_models() -> None:
    assert [command.split()[1] for command, _ in SHOWN] == ["qwen3-30b-a3b", "deepseek-v3"]


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_page_shows_what_the_command_prints(command: str, shown: str) -> None:
    result = CliRunner().invoke(app, shlex.split(command))
    assert lines(result.stdout) == lines(shown), f"docs/scale.md: run swiftmoe {command}, and paste what it prints"


def test_of_one_number_of_ranks_every_group_size_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    result = scale("deepseek-v3", "--ranks", "1024")
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    rows = [line.replace("*", "").split() for line in result.stdout.splitlines() if line.startswith(" 1,024")]
    assert [row[1] for row in rows] == ["1", "2", "4", "8", "16", "32", "64", "128", "1,024"]
    (best,) = re.findall(r"^ 1,024 +\* (\d+)", result.stdout, flags=re.MULTILINE)
    assert f"1,024 ranks: expert_parallel_size={best}, " in result.stdout


def test_json_has_all_numbers_and_nothing_else_is_printed() -> None:
    result = scale(*BY_HAND, "--ranks", "8,16", "--json", "--tokens", "16", "--micro-batches", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    actual = json.loads(result.stdout)
    assert actual["model"]["dim"] == 8
    assert actual["workload"]["micro_batches"] == 3
    assert [cluster["num_ranks"] for cluster in actual["clusters"]] == [8, 16]
    groups = {group["group_size"]: group for group in actual["clusters"][0]["groups"]}
    assert list(groups) == [1, 2, 4, 8]
    assert [groups[size]["token_links"]["two_level"] is None for size in (2, 4, 8)] == [True] * 3
    two_nodes = actual["clusters"][1]["groups"][-1]
    assert two_nodes["group_size"] == 16
    assert two_nodes["token_links"]["two_level"]["between_bytes"] > 0
    assert two_nodes["token_links"]["flat"]["seconds"] == two_nodes["token_seconds"]
    # As in tests/analysis/test_scale.py.
    assert (groups[4]["group_bytes"], groups[4]["across_bytes"], groups[4]["static_bytes"]) == (1152, 384, 384)
    assert actual["clusters"][0]["settings"]["expert_parallel_size"] in groups
    assert actual["clusters"][0]["default_group_size"] == 8
    assert "least time on the wire" in actual["clusters"][0]["why"]


def test_options_reach_the_costs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["mixtral-8x7b"]))
    argv = ["--node-gbytes", "2", "--node-latency-us", "3", "--network-gbytes", "4", "--network-latency-us", "5"]
    argv += ["--gpu-gbytes", "6", "--ranks-per-node", "7", "--param-dtype", "float16", "--reduce-dtype", "float32"]
    argv += ["--token-dtype", "bfloat16"]
    argv += ["--state-dtype", "float64", "--dense-parameters", "9", "--ranks", "4", "--json"]
    result = scale(str(tmp_path), *argv)
    assert result.exit_code == 0, result.output
    actual = json.loads(result.stdout)
    (cluster,) = actual["clusters"]
    assert (cluster["node_bytes"], cluster["network_bytes"], cluster["gpu_bytes"]) == (2e9, 4e9, 6e9)
    assert (cluster["node_latency"], cluster["network_latency"], cluster["ranks_per_node"]) == (3e-6, 5e-6, 7)
    assert (actual["model"]["num_experts"], actual["model"]["dense_parameters"]) == (8, 9)
    assert list(actual["workload"].values()) == [4096, 1, "float16", "float32", "bfloat16", "float64", False, False]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nope"], "there is no model nope. Give a config.json, or one of"),
        ([*BY_HAND[:-2]], "without a model its sizes are needed, and hidden_dim are missing."),
        (["deepseek-v3", "--ranks", "8;16"], "--ranks must be whole numbers with commas between, got '8;16'."),
        (["deepseek-v3", "--ranks", "0"], "num_ranks must be a whole number of 1 or more, got 0."),
        (["deepseek-v3", "--top-k", "300"], "top_k must be at most num_experts (256), got 300."),
        (["deepseek-v3", "--network-gbytes", "0"], "network_bytes must be a number above 0, got 0.0."),
        (["deepseek-v3", "--param-dtype", "fp8"], "param_dtype must be one of 'float32', "),
        (["deepseek-v3", "--token-dtype", "fp8"], "token_dtype must be one of 'bfloat16', 'float8_e4m3fn'"),
    ],
)
def test_what_cannot_be_costed_ends_with_one_line(argv: list[str], message: str) -> None:
    result = scale(*argv)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"swiftmoe scale: {message}")


def test_help_names_the_presets() -> None:
    text = " ".join(scale("--help").stdout.replace("│", " ").split())
    assert all(name in text for name in PRESETS)
