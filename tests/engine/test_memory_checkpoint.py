"""Runs that lose a rank or a node go on from memory, with the losses and weights of a run that was never stopped."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.engine.test_expert_groups import build, train
from tests.engine.test_matches_dense_reference import relative_error
from tests.helpers import nightly, run_ranks, run_script

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "go_on_after_a_lost_node.py"
DTYPE = torch.float64
LOST, LAST = 13, 20

SCRIPT = f"""
import os, runpy, signal, sys
import torch, torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
from tests.engine.test_memory_checkpoint import train_example
example = runpy.run_path({str(EXAMPLE)!r})

def lose(step):
    is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if sys.argv[3] == "a node":
        example["lose_a_node"](step)
    elif not is_first_start:
        example["lose_a_node"](step, rank=0)
    elif step == 6 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)

train_example(sys.argv[1], sys.argv[2], lose)
"""


def train_example(folder: str, losses: str, lose: Callable[[int], None] = lambda _: None) -> None:
    """The example in float64, with every step's loss in the file `losses`: the steps, the loss, the number of ranks."""
    torch.set_default_dtype(DTYPE)

    def note(step: int, loss: float) -> None:
        if dist.get_rank() == 0:
            with Path(losses).open("a") as file:
                file.write(f"{step} {loss!r} {dist.get_world_size()}\n")

    runpy.run_path(str(EXAMPLE))["train"](folder, LAST, lose, note)


@pytest.mark.parametrize("lost", ["a node", *nightly("a rank, then rank 0 with its node")])
def test_what_is_left_of_2_x_2_ranks_goes_on_under_torchrun(lost: str, tmp_path: Path) -> None:
    script, losses = tmp_path / "script.py", tmp_path / "losses"
    script.write_text(SCRIPT)
    arguments = ", ".join(map(repr, (str(script), str(tmp_path), str(losses), lost)))
    code = f"import runpy; print(runpy.run_path({str(EXAMPLE)!r})['run_nodes']({arguments}))"
    said = run_script(sys.executable, "-c", code, cwd=tmp_path)
    # One node's agent was killed, the other's ended well.
    assert said.stdout.splitlines()[-1] == "[-9, 0]", said.stdout + said.stderr
    lines = [line.split() for line in losses.read_text().splitlines()]
    trained = [(int(step), int(ranks)) for step, _, ranks in lines]
    # A kill loses the step that it meets, and the one before if that was still being copied.
    starts = [step for (before, _), (step, _) in pairwise(trained) if step <= before]
    assert [start for start in starts if start > 6] in ([], [LOST - 1])
    assert [ranks for step, ranks in trained if step >= LOST] == [2] * (LAST - LOST + 1)
    assert all(ranks == 4 for step, ranks in trained if step < LOST - 1)
    run_ranks(train_example, 1, str(tmp_path / "one"), str(tmp_path / "expected"), init=False)
    expected = {
        int(step): float(loss) for step, loss, _ in map(str.split, (tmp_path / "expected").read_text().splitlines())
    }
    assert {step for step, _ in trained} == expected.keys()
    assert all(abs(float(loss) - expected[int(step)]) <= 1e-9 for step, loss, _ in lines), (lines, expected)


def go_on(folder: str, nodes: list[int], size: int, mode: str, steps: range) -> tuple[Any, Any]:
    """Train steps of `dense.train_dense` on one rank a node, from what the nodes have in memory."""
    engine, model, optimizer = build(size, DTYPE, dense=mode)
    checkpoint = sml.MemoryCheckpoint(engine, [optimizer], f"{folder}/{nodes[dist.get_rank()]}")
    found = checkpoint.load()
    if steps.start == 12:
        refuse_save_without_room(checkpoint)
    for step in steps:
        train(engine, model, optimizer, range(step, step + 1), DTYPE)
        checkpoint.save(step + 1, {"seen": torch.tensor([step])})
    checkpoint.wait()
    return found, engine.full_state_dict()


def refuse_save_without_room(checkpoint: sml.MemoryCheckpoint) -> None:
    """One node cannot write: all ranks raise, and the next save is as any other."""
    away = checkpoint.folder.with_name("away")
    if dist.get_rank() == 1:
        checkpoint.folder.rename(away)
    checkpoint.save(12)
    message = (
        r"(?s)cannot keep the checkpoint of step 12 in memory.*rank 1: FileNotFoundError.*\(FAQ: memory-checkpoint\)"
    )
    with pytest.raises(OSError, match=message):
        checkpoint.wait()
    if dist.get_rank() == 1:
        away.rename(checkpoint.folder)


def test_nodes_that_are_left_and_new_ones_have_the_exact_state(tmp_path: Path) -> None:
    # Three nodes; one is lost; two go on, each without a part that the other has; a new one with nothing comes.
    first = run_ranks(go_on, 3, str(tmp_path), [0, 1, 2], 3, "ddp", range(12))
    shutil.rmtree(tmp_path / "2")
    parts = [{path.name for path in tmp_path.glob(f"{node}/*/*.distcp")} for node in range(2)]
    assert parts == [{"__0_0.distcp", "__2_0.distcp"}, {"__0_0.distcp", "__1_0.distcp"}]
    second = run_ranks(go_on, 2, str(tmp_path), [0, 1], 1, "fsdp2", range(12, 20))
    third = run_ranks(go_on, 3, str(tmp_path), [3, 1, 0], 3, "hsdp", range(20, dense.STEPS))
    assert [found for found, _ in first] == [None] * 3
    assert [found for found, _ in second] == [{"step": 12, "seen": torch.tensor([11])}] * 2
    assert [found["step"] for found, _ in third] == [20] * 3
    # One directory is left on each, with its rank's part and a copy of another's.
    assert [len([*tmp_path.glob(f"{node}/*")]) for node in (3, 1, 0)] == [1] * 3
    expected = dense.train_dense(dict(models.build().state_dict()), DTYPE)
    for _, state in third:
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-12, errors


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_one_process(folder: Path) -> tuple[sml.MemoryCheckpoint, torch.nn.Module]:
    module = models.build(DTYPE)
    engine = sml.SwiftMoEEngine(module)
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2))
    return sml.MemoryCheckpoint(engine, [optimizer], folder), module


@pytest.mark.usefixtures("one_rank")
def test_a_step_that_is_not_whole_is_passed_over_and_a_damaged_one_refused(tmp_path: Path) -> None:
    checkpoint, module = on_one_process(tmp_path)
    assert checkpoint.load() is None
    checkpoint.save(5)
    checkpoint.wait()
    (whole,) = tmp_path.iterdir()
    saved = {name: value.clone() for name, value in module.state_dict().items()}
    (tmp_path / "notes").write_text("of someone else")
    # What kills leave: a save that has no name yet, and a fetch that was cut off.
    shutil.copytree(whole, tmp_path / "000000000007-0000000a.partial")
    shutil.copytree(whole, tmp_path / "000000000006-0000000a")
    (tmp_path / "000000000006-0000000a" / "__0_0.distcp").unlink()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert checkpoint.load() == {"step": 5}
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    part = whole / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[content.index(saved["0.weight"].numpy().tobytes())] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape("model.0.weight")):
        checkpoint.load()
    checkpoint.save(8)
    checkpoint.wait()
    assert sorted(path.name[:12] for path in tmp_path.iterdir()) == ["000000000008", "notes"]


@pytest.mark.usefixtures("one_rank")
def test_steps_must_be_whole_numbers(tmp_path: Path) -> None:
    checkpoint, _ = on_one_process(tmp_path)
    with pytest.raises(ValueError, match="step must be a whole number of 0 or more, got -1"):
        checkpoint.save(-1)


def test_ranks_need_a_process_group(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Call torch.distributed.init_process_group first"):
        on_one_process(tmp_path)
