"""docs/training-step.md's table of waits and copies, made of the calls in the code: `python -m tests.host_copies`
rewrites it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
PACKAGE: Final = ROOT / "swiftmoe_lightning"
# The folders that run in a training step.
FOLDERS: Final = ("ops", "distributed", "modules", "engine")
START, END = "<!-- waits and copies: python -m tests.host_copies -->", "<!-- end -->"
# What copies between host and device, or makes the host wait, by the name that is called.
CALLS: Final = {"to_device", "to_host", "HostCopy", "cpu", "item", "tolist", "nonzero", "from_numpy", "synchronize"}

UP, DOWN, WAIT = "up", "down", "down, waits"
# File and function -> which way, how often, what.
IN_A_STEP: Final[dict[str, tuple[str, str, str]]] = {
    "modules/dispatch.py TokenDispatcher.__init__": (UP, "layer, forward", "all tables of the layer's plan"),
    "modules/two_level.py NodeTokens.__init__": (
        "up; down, waits",
        "layer, forward, at two levels",
        "which pairs each node has; what all ranks send to each node and pair",
    ),
    "modules/two_level.py TwoLevelDispatcher.dispatch": (
        UP,
        "layer, forward, at two levels",
        "rows of each expert from each relay",
    ),
    "engine/handshake.py ForwardHandshake.start": (UP, "layer, forward", "the host's part of the header"),
    "engine/handshake.py ForwardHandshake._start": (DOWN, "layer, forward", "all ranks' counts and headers"),
    "distributed/host_device.py HostCopy.wait": (WAIT, "each copy down", "the wait for it"),
    "modules/context.py SingleDeviceContext.start_count": (
        DOWN,
        "layer, forward",
        "one device with a capacity: its counts",
    ),
    "modules/load.py TrainedLoad.total": (WAIT, "layer, read of the load", "one device without a capacity: its counts"),
    "modules/real_tokens.py _places": (WAIT, "layer, forward with a mask", "which tokens are real"),
    "modules/sinkhorn_router.py sinkhorn": (WAIT, "iteration, `SinkhornRouter`", "whether it has converged"),
    "modules/expert_choice.py _chosen": (WAIT, "layer, forward, `ExpertChoiceRouter`", "the most experts of a token"),
    "modules/router.py TopKRouter.update_bias": (UP, "router with a bias, step", "which way each bias moves"),
    "engine/handshake.py ForwardHandshake.end_update": (
        "up, down",
        "step",
        "several expert groups: whether one of them wants to stop",
    ),
    "engine/layer_state.py update_router_biases": (
        WAIT,
        "step",
        "several expert groups, biases: the popularity of all groups",
    ),
    "engine/streamed_window.py StreamedWindow._announce": (
        "up; down, waits",
        "layer, forward without gradients",
        "several expert groups, `reshard_after_forward`: which layer another group fills",
    ),
    "engine/packed_exchange.py PackedDistribution.__init__": (UP, "layer, step", "which expert each pair has"),
    "engine/arrivals.py find_arrivals": (
        "up; down, waits",
        "step",
        "several expert groups, frozen weights: the experts that arrive in any of them",
    ),
    "engine/replica_exchange.py ReplicaExchange._experts": (
        UP,
        "layer, placement that moves",
        "several expert groups, frozen weights: the experts that arrive",
    ),
    "engine/packed_exchange.py _sum_over_ranks": (UP, "layer, step", "which pairs are added up, and to which experts"),
    "distributed/matrix_exchange.py refuse_different_matrices": (
        "up; down, waits",
        "step of `Muon`",
        "whether all ranks have gradients of the same matrices",
    ),
    "distributed/side_stream.py SideStream.join": (WAIT, "layer, step", "offloaded experts: their gradients"),
    "ops/grouped.py _by_slot": (WAIT, "product", "float64, or sizes that `F.grouped_mm` does not take: rows of slots"),
    "engine/gradients.py _norm": (UP, "gradient clipping", "the norm of no gradient"),
    "distributed/dtensor_scalars.py _item": (WAIT, "number read", "`.item()` of a sharded gradient, by the user"),
}
# Not in a step of training, or of what is on the host anyway.
ELSEWHERE: Final[dict[str, str]] = {
    "distributed/expert_group.py ExpertGroup.broadcast_int": "setup",
    "distributed/matrix_exchange.py rows_by_rank": "a parameter's first step",
    "distributed/node_groups.py measure_speed": "setup",
    "distributed/host_device.py to_device": "what the callers are listed for",
    "distributed/host_device.py to_host": "what the callers are listed for",
    "engine/checkpoint.py full_state": "checkpoints",
    "engine/direct_exchange.py DirectCollection._places": "on the CPU alone",
    "engine/direct_exchange.py DirectDistribution.__init__": "on the CPU alone",
    "engine/gradient_placeholder.py _zeros_like": "on the CPU alone",
    "engine/handshake.py ForwardHandshake._explain_failure": "an error",
    "engine/handshake.py ForwardHandshake._without_counts": "an epoch, evaluation, gathered dense weights",
    "engine/handshake.py ForwardHandshake.begin_epoch": "an epoch",
    "engine/handshake.py ForwardHandshake._check": "on the host",
    "engine/handshake_rows.py HandshakeTable.tokens_W": "on the host",
    "engine/hidden_pieces.py HiddenPieces.give_back": "between evaluation with sharded experts and training",
    "engine/hidden_pieces.py _exchange": "between training and evaluation with sharded experts",
    "engine/layer_state.py LayerState.state_dict": "checkpoints",
    "engine/shard_parameters.py shard_parameters": "setup",
    "modules/dispatch.py TokenDispatcher._start_counts": "on the host",
    "modules/experts.py Experts.reset_parameters": "setup",
    "modules/sequence_clusters.py _first_centers": "before training",
    "modules/routing_ids.py as_integers": "a recording from an array",
    "modules/routing_ids.py check_recording": "an error",
    "modules/routing_replay.py routing_to_array": "a recording as an array",
    "modules/sharded_forward.py finish_sharded": "evaluation with sharded experts",
}


def calls_in(tree: ast.AST, scope: str = "") -> Iterator[tuple[str, int]]:
    """(function, line) of every call that `CALLS` names, and of `torch.tensor(..., device=...)`."""
    for node in ast.iter_child_nodes(tree):
        inner = scope
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = f"{scope}.{node.name}".removeprefix(".")
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            places = name == "tensor" and any(keyword.arg == "device" for keyword in node.keywords)
            if name in CALLS or places:
                yield scope, node.end_lineno if name == "tolist" and node.end_lineno else node.lineno
        yield from calls_in(node, inner)


def found() -> dict[str, list[int]]:
    """File and function -> the lines of its calls."""
    lines: dict[str, set[int]] = {}
    for path in sorted(path for folder in FOLDERS for path in (PACKAGE / folder).rglob("*.py")):
        for function, line in calls_in(ast.parse(path.read_text())):
            lines.setdefault(f"{path.relative_to(PACKAGE)} {function}", set()).add(line)
    return {place: sorted(numbers) for place, numbers in lines.items()}


def table() -> str:
    """The table in Markdown."""
    lines = found()
    rows = ["| where | which way | once a | what |", "|---|---|---|---|"]
    for place, (way, often, what) in IN_A_STEP.items():
        file, function = place.split()
        rows.append(f"| `{file}:{', '.join(map(str, lines[place]))}` `{function}` | {way} | {often} | {what} |")
    return "\n".join(rows)


def parts() -> tuple[str, str, str]:
    """The page before the table, the table in it, and the page behind it."""
    before, _, rest = (ROOT / "docs" / "training-step.md").read_text().partition(START)
    inside, _, after = rest.partition(END)
    return before, inside.strip(), after


if __name__ == "__main__":
    before, _, after = parts()
    (ROOT / "docs" / "training-step.md").write_text(f"{before}{START}\n{table()}\n{END}{after}")
