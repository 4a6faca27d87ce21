from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.analysis import read_trace
from swiftmoe_lightning.callbacks.placement_recorder import _BackgroundWriter
from tests.callbacks.test_popularity_monitor import Memory
from tests.helpers import run_ranks
from tests.strategies.cases import DIM, GLOBAL_BATCH, NUM_BATCHES, Model, loader, trainer

NUM_STEPS = 2 * NUM_BATCHES
LAYER = "moe.experts"


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


class Fit:
    """A fit of `model` with a recorder; returns a reader's totals and what the monitor logs of every step."""

    def __init__(self, path: Path, world_size: int, strategy: Any, model: Any, **options: Any) -> None:
        self.path, self.world_size, self.strategy, self.model, self.options = path, world_size, strategy, model, options

    def __call__(self) -> dict[str, Any]:
        model, logger = self.model(), Memory()
        callbacks = [sml.PlacementRecorder(self.path), sml.ExpertPopularityMonitor()]
        options = {"logger": logger, "log_every_n_steps": 1, **self.options}
        reader = sml.LoadReader(model)
        runner = trainer(self.world_size, self.strategy, callbacks=callbacks, **options)
        runner.fit(model, loader(self.world_size), loader(self.world_size, GLOBAL_BATCH))
        load = reader.read()[LAYER]
        return {
            "counts": load.counts_WE.tolist(),
            "load": load.load_W.tolist(),
            "dropped": load.num_dropped_tokens,
            "moved": list(logger.values["moe/num_replicas_moved"].values()),
        }


def capped() -> Model:
    return Model(capacity_factor=1.0)


def test_recorded_steps_add_up_to_a_readers_totals(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.npz"
    expected = run_ranks(Fit(path, 2, "swiftmoe", capped), 2, init=False)[0]
    recorded = load(path)
    assert {name: (a.shape, a.dtype) for name, a in recorded.items() if name != "metadata"} == {
        "counts": ((NUM_STEPS, 2, 1, 5), np.int64),
        "replicas": ((NUM_STEPS, 1, 5), np.int64),
        "loads": ((NUM_STEPS, 1, 2), np.int64),
        "dropped": ((NUM_STEPS, 1), np.int64),
        "moved": ((NUM_STEPS, 1), np.int64),
        "step": ((NUM_STEPS,), np.int64),
    }
    assert recorded["counts"].sum(0)[:, 0].tolist() == expected["counts"]
    assert recorded["loads"].sum(0)[0].tolist() == expected["load"]
    assert recorded["dropped"].sum() == expected["dropped"] > 0
    assert recorded["moved"].sum(1).tolist() == expected["moved"]
    assert sum(expected["moved"]) > 0
    np.testing.assert_array_equal(recorded["loads"].sum(-1) + recorded["dropped"], recorded["counts"].sum((1, 3)))
    assert recorded["replicas"].sum(-1).tolist() == [[8]] * NUM_STEPS
    assert recorded["step"].tolist() == list(range(1, NUM_STEPS + 1))
    assert json.loads(str(recorded["metadata"])) == {
        "format_version": 1,
        "capacity_factor": 1.0,
        "layers": [LAYER],
        "world_size": 2,
        "slots_per_rank": 4,
        "finished": True,
    }


def test_a_parquet_path_gets_the_counts_as_a_table(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.parquet"
    expected = run_ranks(Fit(path, 2, "swiftmoe", capped), 2, init=False)[0]
    trace = read_trace(path)
    assert trace.counts_UWLE.shape == (NUM_STEPS, 2, 1, 5)
    assert trace.counts_UWLE.sum(0)[:, 0].tolist() == expected["counts"]
    assert trace.step_U.tolist() == list(range(1, NUM_STEPS + 1))
    assert trace.metadata == {
        "format_version": 1,
        "capacity_factor": 1.0,
        "layers": [LAYER],
        "world_size": 2,
        "slots_per_rank": 4,
        "finished": True,
    }


def test_a_parquet_path_without_pyarrow_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "swiftmoe-lightning\[parquet\]"'):
        sml.PlacementRecorder("trace.parquet")
    sml.PlacementRecorder("trace.npz")


@pytest.mark.parametrize("seconds", [-1, float("inf"), "30", None])
def test_a_pause_that_is_no_number_is_refused(seconds: Any) -> None:
    with pytest.raises(ValueError, match="write_every_n_seconds must be a number"):
        sml.PlacementRecorder("trace.npz", seconds)


class ThreeOfFour(nn.Module):
    """Of every four tokens, three choose experts 0 and 1, and one chooses 2 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_TD: Tensor) -> sml.RouterOutput:
        ids_TK = torch.tensor([[0, 1], [0, 1], [0, 1], [2, 3]]).repeat(len(x_TD) // 4, 1)
        probs_TE = torch.full((len(x_TD), 5), 0.2)
        return sml.RouterOutput(ids_TK, self.scale * torch.full(ids_TK.shape, 0.5), probs_TE, probs_TE)


def three_of_four() -> Model:
    return Model(capacity_factor=1.0, router=ThreeOfFour())


def test_two_ranks_record_what_is_found_by_hand(tmp_path: Path) -> None:
    strategy = sml.SwiftMoEStrategy(placement="static", slots_per_rank=4)
    run_ranks(Fit(tmp_path / "trace.npz", 2, strategy, three_of_four), 2, init=False)
    recorded = load(tmp_path / "trace.npz")
    # Slots [0 0 1 1 | 2 2 3 4]: of 24 tokens' 48 assignments rank 0 gets 36, and computes its budget, half of the 48.
    assert GLOBAL_BATCH == 24
    assert recorded["counts"].tolist() == [[[[9, 9, 3, 3, 0]], [[9, 9, 3, 3, 0]]]] * NUM_STEPS
    assert recorded["replicas"].tolist() == [[[2, 2, 2, 1, 1]]] * NUM_STEPS
    assert recorded["loads"].tolist() == [[[24, 12]]] * NUM_STEPS
    assert recorded["dropped"].tolist() == [[12]] * NUM_STEPS
    assert recorded["moved"].tolist() == [[0]] * NUM_STEPS


def test_accumulated_batches_are_one_row(tmp_path: Path) -> None:
    fit = Fit(tmp_path / "trace.npz", 1, "auto", capped, accumulate_grad_batches=NUM_BATCHES)
    run_ranks(fit, 1, init=False)
    recorded = load(tmp_path / "trace.npz")
    assert recorded["step"].tolist() == [1, 2]
    assert recorded["counts"].sum((1, 2, 3)).tolist() == [NUM_BATCHES * GLOBAL_BATCH * 2] * 2


class Breaks(Model):
    """Fails in the fourth step, and says what the recording held in the second."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.seen = path, ""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index == 1:
            wait_for(self.path.exists)
            trace = read_trace(self.path)
            self.seen = f"{trace.step_U.tolist()}, finished: {trace.metadata['finished']}"
        if index == 3:
            raise RuntimeError(f"out of order, saw {self.seen}")
        return super().training_step(batch, index)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_recording_is_there_after_the_first_step_and_a_fit_that_breaks_off_leaves_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with pytest.raises(AssertionError, match=r"out of order, saw \[1\], finished: False"):
        run_ranks(Fit(path, 1, "auto", partial(Breaks, path)), 1, init=False)
    trace = read_trace(path)
    assert (trace.step_U.tolist(), trace.metadata["finished"]) == ([1, 2, 3], True)
    assert list(tmp_path.iterdir()) == [path]


def test_writes_are_made_in_a_thread_one_at_a_time_with_a_pause_after_each() -> None:
    writer, may_end = _BackgroundWriter(0.0), Event()
    assert writer.is_due
    writer.start(may_end.wait)  # type: ignore[arg-type]
    assert not writer.is_due
    time.sleep(0.1)
    may_end.set()
    writer.wait()
    # Nine times the 0.1 s of the write.
    assert not writer.is_due
    wait_for(lambda: writer.is_due)


def test_a_write_that_fails_is_warned_of_and_made_again() -> None:
    def fail() -> None:
        raise OSError("No space left on device")

    writer = _BackgroundWriter(0.0)
    with pytest.warns(UserWarning, match=r"could not write, and will try again: OSError\('No space left on device'\)"):
        writer._run(fail)
    wait_for(lambda: writer.is_due)


class Two(Model):
    """A second layer of `num_experts`, used by the odd batches alone."""

    def __init__(self, num_experts: int = 5) -> None:
        super().__init__()
        self.other = sml.MoE(DIM, 10, num_experts, 1)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss + self.other(batch[0]).square().mean() if index % 2 else loss


def test_a_layer_that_a_step_did_not_use_has_zeros_in_its_row(tmp_path: Path) -> None:
    run_ranks(Fit(tmp_path / "trace.npz", 1, "auto", Two), 1, init=False)
    recorded = load(tmp_path / "trace.npz")
    assert recorded["counts"].sum((1, 3)).tolist() == [[2 * GLOBAL_BATCH, 0], [2 * GLOBAL_BATCH, GLOBAL_BATCH]] * 4
    assert recorded["replicas"].sum(-1).tolist() == [[5, 0], [5, 5]] * 4


def six_and_five() -> Model:
    return Two(6)


def dense() -> Any:
    model = Model()
    model.moe = nn.Identity()  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (six_and_five, r"one number of experts.*'moe\.experts': 5, 'other\.experts': 6.*Give all layers the same"),
        (dense, "found no MoE layer in Model"),
    ],
)
def test_what_does_not_fit_one_table_is_refused_when_training_starts(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_ranks(Fit(tmp_path / "trace.npz", 1, "auto", model), 1, init=False)
    assert not (tmp_path / "trace.npz").exists()


def test_a_path_that_cannot_be_written_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        NotADirectoryError, match=r"file/runs/trace\.npz cannot be written, as .+/file is a file\. Name"
    ):
        sml.PlacementRecorder(tmp_path / "file" / "runs" / "trace.npz")
    with pytest.raises(IsADirectoryError, match=r"is a folder, and a file is to be written\. Name a file in it\."):
        sml.PlacementRecorder(tmp_path)
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path)
    with pytest.raises(PermissionError, match=rf"trace\.npz cannot be written: {tmp_path} is read-only\. Name another"):
        sml.PlacementRecorder(tmp_path / "new" / "trace.npz")
    # A file beside it takes its place.
    with pytest.raises(
        PermissionError, match=rf"file\.partial cannot be written: {tmp_path} is read-only\. Name another"
    ):
        sml.PlacementRecorder(tmp_path / "file")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
