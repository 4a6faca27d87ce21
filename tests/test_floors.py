"""The package's structure: imports go down only, libraries have homes, files have tests, and no file is long."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "swiftmoe_lightning"
KERNELS = PACKAGE / "ops" / "triton"
TRAINER = PACKAGE / "huggingface" / "trainer.py"
PEFT_ADAPTERS = PACKAGE / "huggingface" / "peft_adapters.py"
EXPERT_PARALLEL = PACKAGE / "huggingface" / "expert_parallel.py"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = [
    "config private_names",
    "placement",
    "ops analysis",
    "distributed",
    "modules",
    "engine",
    "strategies accelerate",
    "huggingface callbacks",
    "demo doctor",
    "cli",
    "__main__",
]
FLOOR_OF = {name: height for height, names in enumerate(FLOORS) for name in names.split()}

HOMES = {
    "triton": {"ops"},
    "torch.distributed": {"distributed", "engine", "strategies", "accelerate"},
    "lightning": {"strategies", "callbacks", "demo"},
    "accelerate": {"accelerate"},
    "transformers": {"huggingface"},
    "peft": {"huggingface"},
    "matplotlib": {"analysis"},
    "pyarrow": {"analysis"},
    "typer": {"cli"},
    "rich": {"cli", "demo", "doctor", "analysis"},
}
OPTIONAL = {"triton", "accelerate", "transformers", "peft", "matplotlib", "pyarrow"}
# What alone imports an optional library at module level, and is itself imported only where it is used.
LATE = {
    "swiftmoe_lightning.ops.triton": (KERNELS, {"triton"}),
    "swiftmoe_lightning.huggingface.trainer": (TRAINER, {"transformers"}),
    "swiftmoe_lightning.huggingface.expert_parallel": (EXPERT_PARALLEL, {"transformers"}),
    "swiftmoe_lightning.huggingface.peft_adapters": (PEFT_ADAPTERS, {"peft"}),
}
WITHOUT_TORCH = {"config", "private_names", "placement", "analysis"}

# Source file -> the test that covers it, for every file that `tests/` has no file of the same name for.
TESTED_IN = {
    "__main__.py": "demo/test_run.py",
    "accelerate/preparation.py": "accelerate/test_prepare.py",
    "cli/memory.py": "test_cli_memory.py",
    "cli/options.py": "test_cli.py",
    "cli/plan.py": "test_cli_recommend.py",
    "demo/both.py": "demo/test_run.py",
    "demo/options.py": "demo/test_run.py",
    "demo/printing.py": "demo/test_run.py",
    "distributed/backends.py": "test_doctor.py",
    "distributed/dtensor_handlers.py": "distributed/test_dtensor_extension.py",
    "distributed/dtensor_random.py": "distributed/test_dtensor_extension.py",
    "distributed/dtensor_refusals.py": "distributed/test_dtensor_extension.py",
    "distributed/dtensor_scalars.py": "engine/test_gradients.py",
    "distributed/dtensor_writes.py": "distributed/test_dtensor_extension.py",
    "distributed/group.py": "engine/test_weight_traffic.py",
    "distributed/host_group.py": "engine/test_memory_checkpoint.py",
    "distributed/launch_facts.py": "distributed/test_launch_check.py",
    "distributed/matrix_exchange.py": "engine/test_muon.py",
    "distributed/loaded_experts.py": "huggingface/test_expert_parallel.py",
    "distributed/private.py": "test_private_names.py",
    "distributed/sharding.py": "engine/test_matches_dense_reference.py",
    "distributed/store_barrier.py": "huggingface/test_save_pretrained.py",
    "distributed/tensor_parallel.py": "engine/test_tensor_parallel.py",
    "engine/checkpoint.py": "strategies/test_checkpoints.py",
    "engine/checkpoint_files.py": "engine/test_damaged_checkpoints.py",
    "engine/checkpoint_verification.py": "test_doctor_checkpoints.py",
    "engine/data_parallel.py": "engine/test_failed_backward.py",
    "engine/distribution_window.py": "engine/test_phases_behind_compute.py",
    "engine/engine.py": "engine/test_engine_setup.py",
    "engine/gradient_collector.py": "engine/test_random_training_loops.py",
    "engine/gradient_placeholder.py": "strategies/test_discarded_gradients.py",
    "engine/group_factory.py": "engine/test_expert_groups.py",
    "engine/handshake.py": "engine/test_engine_setup.py",
    "engine/handshake_rows.py": "engine/test_engine_setup.py",
    "engine/layer_evaluation.py": "engine/test_sharded_evaluation.py",
    "engine/layer_gradients.py": "strategies/test_discarded_gradients.py",
    "engine/layer_state.py": "engine/test_refused_arguments.py",
    "engine/materialize.py": "engine/test_engine_setup.py",
    "engine/muon_matrices.py": "engine/test_muon.py",
    "engine/packed_exchange.py": "engine/test_direct_exchange.py",
    "engine/parameter_swap.py": "strategies/test_fabric.py",
    "engine/prepared_optimizers.py": "engine/test_engine_setup.py",
    "engine/replica_exchange.py": "engine/test_expert_groups.py",
    "engine/save_pretrained.py": "huggingface/test_save_pretrained.py",
    "engine/shard_parameters.py": "engine/test_experts_cut_before.py",
    "engine/sharded_layer.py": "engine/test_matches_dense_reference.py",
    "engine/slots.py": "engine/test_weight_traffic.py",
    "engine/stale_parameters.py": "engine/test_engine_setup.py",
    "engine/weight_exchange.py": "engine/test_expert_groups.py",
    "engine/weight_paths.py": "engine/test_arrivals.py",
    "engine/weight_window.py": "engine/test_streamed_window.py",
    "huggingface/layouts.py": "huggingface/test_convert.py",
    "huggingface/sharded_at_load.py": "huggingface/test_expert_parallel.py",
    "modules/adapters.py": "huggingface/test_peft_adapters.py",
    "modules/chosen_experts.py": "modules/test_routing_replay.py",
    "modules/context.py": "modules/test_single_device.py",
    "modules/dispatch.py": "engine/test_matches_dense_reference.py",
    "modules/expert_choice.py": "modules/test_routers.py",
    "modules/expert_inputs.py": "modules/test_expert_ids_and_casts.py",
    "modules/experts.py": "modules/test_moe.py",
    "modules/forward.py": "modules/test_moe.py",
    "modules/group_limited.py": "modules/test_routers.py",
    "modules/hash_router.py": "modules/test_routers.py",
    "modules/hidden_cuts.py": "engine/test_hidden_pieces.py",
    "modules/noisy_routers.py": "modules/test_routers.py",
    "modules/sharded_forward.py": "engine/test_sharded_evaluation.py",
    "modules/sinkhorn_router.py": "modules/test_routers.py",
    "modules/weights.py": "modules/test_expert_ids_and_casts.py",
    "modules/initialize.py": "engine/test_engine_setup.py",
    "modules/load.py": "modules/test_single_device.py",
    "modules/reader.py": "modules/test_moe.py",
    "modules/routing_ids.py": "modules/test_routing_replay.py",
    "modules/routing_tap.py": "modules/test_routing_replay.py",
    "modules/two_level.py": "engine/test_two_level.py",
    "strategies/checkpoint_io.py": "strategies/test_checkpoint_files.py",
    "strategies/join.py": "strategies/test_evaluation.py",
    "strategies/lightning.py": "strategies/test_fit.py",
    "strategies/private.py": "test_private_names.py",
    "strategies/registration.py": "strategies/test_launch.py",
    "strategies/shard_dense.py": "strategies/test_fully_sharded.py",
    "strategies/signals.py": "strategies/test_sigterm_trainer.py",
    "analysis/baselines/revising.py": "analysis/baselines/test_baselines.py",
    "analysis/baselines/tables.py": "analysis/baselines/test_baselines.py",
    "analysis/candidates.py": "analysis/test_plan.py",
    "analysis/cluster.py": "analysis/test_scale.py",
    "analysis/report/figure.py": "demo/test_run.py",
    "analysis/report/page_data.py": "analysis/report/test_page.py",
    "analysis/report/page_numbers.py": "analysis/report/test_page.py",
    "analysis/report/page_text.py": "analysis/report/test_page.py",
    "analysis/report/plan_table.py": "test_cli.py",
    "analysis/report/memory_table.py": "test_cli_memory.py",
    "analysis/report/scale_table.py": "test_cli_scale.py",
    "analysis/report/scenario_table.py": "test_cli_scenarios.py",
    "analysis/report/sweep_table.py": "test_cli_recommend.py",
    "analysis/scale_advice.py": "analysis/test_scale.py",
    "analysis/sizes.py": "analysis/test_plan.py",
    "analysis/write_trace.py": "analysis/test_read_trace.py",
    "placement/load.py": "placement/test_placer.py",
    "ops/common.py": "ops/test_operators.py",
    "ops/triton/activation.py": "ops/test_activation.py",
    "ops/triton/bias.py": "ops/test_bias.py",
    "ops/triton/fused/hidden_gradient.py": "ops/test_fused.py",
    "ops/triton/fused/product.py": "ops/test_fused.py",
    "ops/triton/fused/score_gradient.py": "ops/test_fused.py",
    "ops/triton/fused/tiles.py": "ops/test_fused.py",
    "ops/triton/fused/up.py": "ops/test_fused.py",
    "ops/triton/fused/weight_gradient.py": "ops/test_fused.py",
    "ops/triton/launch.py": "ops/test_aot.py",
    "ops/triton/permute.py": "ops/test_permute.py",
    "ops/triton/quantize.py": "ops/test_quantize.py",
    "ops/triton/regroup.py": "ops/test_regroup.py",
    "ops/triton/route.py": "ops/test_route.py",
    "ops/triton/sort.py": "ops/test_sort.py",
}


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted name of everything a file imports, wherever it does so; from-imports down to the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(room: str, source: str) -> list[str]:
    """What a file in `room` imports against the rules."""
    actual = []
    for name in imports(ast.parse(source)):
        if name.startswith("swiftmoe_lightning."):
            other = name.split(".")[1]
            if other in FLOOR_OF and FLOOR_OF[other] >= FLOOR_OF[room] and other != room:
                actual.append(f"{room} (floor {FLOOR_OF[room]}) imports {name} (floor {FLOOR_OF[other]})")
        for library, homes in HOMES.items():
            if (name == library or name.startswith(f"{library}.")) and room not in homes:
                actual.append(f"{library} is at home in {sorted(homes)}, not in {room}")
        if name.split(".")[0] == "torch" and room in WITHOUT_TORCH:
            actual.append(f"{room} must work without torch")
    return actual


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_down_and_libraries_stay_at_home(path: Path) -> None:
    assert room_of(path) in FLOOR_OF, f"{room_of(path)} has no floor: add it to FLOORS or move the file"
    assert not faults(room_of(path), path.read_text())


def test_the_map_in_contributing_is_that_of_the_floors() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text, flags=re.MULTILINE)
    assert {name: int(height) for height, name in rows} == FLOOR_OF
    assert [int(height) for height, _ in rows] == sorted((int(height) for height, _ in rows), reverse=True)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("placement", "import torch"),
        ("placement", "from swiftmoe_lightning.ops import permute"),
        ("modules", "import torch.distributed as dist"),
        ("modules", "from swiftmoe_lightning.engine import SwiftMoEEngine"),
        ("engine", "from lightning.pytorch import Trainer"),
        ("callbacks", "from swiftmoe_lightning.demo import run"),
        ("ops", "def late():\n    from swiftmoe_lightning.distributed import ExpertGroup"),
    ],
)
def test_a_wrong_import_is_found(room: str, line: str) -> None:
    assert faults(room, line)


def eager_optionals(path: Path, source: str) -> set[str]:
    """What a file imports at module level though the package must work without it: an optional library, or one of the
    files that alone may import theirs."""
    within = [name for name, (home, _) in LATE.items() if path.is_relative_to(home)]
    allowed = {library for name in within for library in LATE[name][1]}
    actual = set()
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            names = set(imports(statement))
            actual |= {name for name in names if name.split(".")[0] in OPTIONAL - allowed}
            for late in LATE.keys() - within:
                actual |= {name for name in names if f"{name}.".startswith(f"{late}.")}
    return actual


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_optional_is_imported_only_where_it_is_used(path: Path) -> None:
    assert not eager_optionals(path, path.read_text())


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/permute.py", "import triton"),
        ("ops/permute.py", "import swiftmoe_lightning.ops.triton"),
        ("ops/permute.py", "from swiftmoe_lightning.ops.triton.permute import permute"),
        ("modules/moe.py", "from swiftmoe_lightning.ops import triton"),
        ("ops/triton/permute.py", "import pyarrow"),
        ("accelerate/preparation.py", "import transformers"),
        ("huggingface/__init__.py", "from swiftmoe_lightning.huggingface.trainer import SwiftMoETrainer"),
        ("huggingface/trainer.py", "import triton"),
    ],
)
def test_an_eager_import_is_found(file: str, line: str) -> None:
    assert eager_optionals(PACKAGE / file, line)
    assert not eager_optionals(PACKAGE / file, f"def late():\n    {line}")


def test_the_package_works_without_triton() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None; import swiftmoe_lightning.ops as k;"
        "print(k.permute(torch.ones(1, 2), k.sort_assignments(torch.tensor([[0]]), 1)).tolist())"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[[1.0, 1.0]]\n"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 300
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef) and "triton.jit" not in map(ast.unparse, node.decorator_list):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_every_source_file_has_a_test_of_its_name_or_says_where_it_is_tested() -> None:
    sources = [path.relative_to(PACKAGE) for path in FILES if path.name != "__init__.py"]
    without = {str(source) for source in sources if not (TESTS / source.parent / f"test_{source.stem}.py").is_file()}
    assert TESTED_IN.keys() == without, "add what is missing to TESTED_IN, and take out what has a test of its name"
    assert not [test for test in TESTED_IN.values() if not (TESTS / test).is_file()]
