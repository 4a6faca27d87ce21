"""Plain checkpoint files are whole or not there, and what cannot be written or read is an error on every rank."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.checkpoint_files import partial_path
from swiftmoe_lightning.strategies.checkpoint_io import WholeFileIO
from tests.engine import models
from tests.helpers import rank_errors, run_ranks
from tests.strategies.cases import Model, loader, trainer

OLD, NEW = {"step": 1}, {"step": 2, "weights": torch.ones(1 << 20)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    WholeFileIO().save_checkpoint(OLD, tmp_path / "run" / "last.ckpt")
    return tmp_path / "run" / "last.ckpt"


def names(folder: Path) -> list[str]:
    return sorted(actual.name for actual in folder.iterdir())


def half(value: Any, file: Any) -> None:
    file.write(bytes(1000))
    file.flush()


def test_a_file_of_another_file_system_is_not_copied_over_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_and_die(source: str, target: str, *_: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "move", copy_and_die)
    with pytest.raises(OSError, match="No space left"):
        TorchCheckpointIO().save_checkpoint(NEW, path.with_name("lightning.ckpt"))
    assert path.with_name("lightning.ckpt").stat().st_size == 1000
    path.with_name("lightning.ckpt").unlink()
    WholeFileIO().save_checkpoint(NEW, path)
    assert WholeFileIO().load_checkpoint(path)["step"] == 2
    assert names(path.parent) == ["last.ckpt"]


def fail_half_way(value: Any, file: Any) -> None:
    half(value, file)
    raise OSError(28, "No space left on device")


def die_half_way(value: Any, file: Any) -> None:
    half(value, file)
    os.kill(os.getpid(), signal.SIGKILL)


def save_with(save: Callable[..., None], path: Path) -> None:
    torch.save = save  # type: ignore[assignment]
    WholeFileIO().save_checkpoint(NEW, path)


def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises(OSError, match="No space left on device"):
        WholeFileIO().save_checkpoint(NEW, path)
    assert path.read_bytes() == before
    assert names(path.parent) == ["last.ckpt"]


def test_a_limit_of_the_system_is_named_and_leaves_nothing(path: Path) -> None:
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            WholeFileIO().save_checkpoint(NEW, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert names(path.parent) == ["last.ckpt"]


def test_a_kill_half_way_leaves_the_old_file_and_one_that_the_next_save_removes(path: Path) -> None:
    before = path.read_bytes()
    process = multiprocessing.get_context("spawn").Process(target=save_with, args=(die_half_way, path))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert names(path.parent) == ["last.ckpt", "last.ckpt.partial"]
    WholeFileIO().save_checkpoint(NEW, path)
    assert names(path.parent) == ["last.ckpt"]


def test_what_a_kill_leaves_is_no_checkpoint_to_lightning(tmp_path: Path) -> None:
    for name in ("last.ckpt", "hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"):
        (partial_path(tmp_path / name)).write_bytes(b"half")
    runner = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert runner._checkpoint_connector._hpc_resume_path is None
    assert not ModelCheckpoint(tmp_path)._find_last_checkpoints(runner)
    WholeFileIO().save_checkpoint(OLD, tmp_path / "hpc_ckpt_1.ckpt")
    assert runner._checkpoint_connector._hpc_resume_path == str(tmp_path / "hpc_ckpt_1.ckpt")


def test_a_link_to_the_last_checkpoint_is_replaced_and_its_target_stays(path: Path) -> None:
    path.rename(path.with_name("epoch=1.ckpt"))
    path.symlink_to("epoch=1.ckpt")
    WholeFileIO().save_checkpoint(NEW, path)
    assert not path.is_symlink()
    assert WholeFileIO().load_checkpoint(path)["step"] == 2
    assert WholeFileIO().load_checkpoint(path.with_name("epoch=1.ckpt")) == OLD


def fit_with_links(folder: str) -> None:
    for epochs in (2, 4):
        keep = ModelCheckpoint(folder, filename="{epoch}", save_last="link", save_top_k=-1)
        runner = trainer(1, callbacks=[keep], enable_checkpointing=True, max_epochs=epochs)
        runner.fit(Model(), loader(1), loader(1), ckpt_path="last" if epochs == 4 else None)
        assert runner.current_epoch == epochs


def test_model_checkpoint_links_and_resumes(tmp_path: Path) -> None:
    run_ranks(fit_with_links, 1, str(tmp_path), init=False)
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=3.ckpt"
    assert names(tmp_path) == [*(f"epoch={epoch}.ckpt" for epoch in range(4)), "last.ckpt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        WholeFileIO().save_checkpoint(OLD, tmp_path / "run.ckpt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run.ckpt").stat().st_mode) == 0o666 & ~umask


def test_file_urls_and_remote_file_systems_are_taken(path: Path) -> None:
    WholeFileIO().save_checkpoint(NEW, f"file://{path}")
    assert WholeFileIO().load_checkpoint(f"file://{path}")["step"] == 2
    WholeFileIO().save_checkpoint(OLD, "memory://run/last.ckpt")
    assert WholeFileIO().load_checkpoint("memory://run/last.ckpt") == OLD
    with pytest.raises(FileNotFoundError):
        WholeFileIO().load_checkpoint("memory://run/none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*none\.ckpt"):
        WholeFileIO().load_checkpoint(path.with_name("none.ckpt"))
    with pytest.raises(TypeError, match="storage_options"):
        WholeFileIO().save_checkpoint(OLD, path, storage_options={})


def test_a_damaged_record_is_named(path: Path) -> None:
    WholeFileIO().save_checkpoint(NEW, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert torch.load(path)["step"] == 2
    with pytest.raises(
        ValueError, match=r"cannot read the checkpoint '.*' \(last\.ckpt is damaged: its record 'archive/"
    ):
        WholeFileIO().load_checkpoint(path)


@pytest.mark.parametrize("make", [sml.SwiftMoEStrategy, sml.SwiftMoEFabricStrategy])
def test_the_users_plugin_stays_and_a_wrapper_is_filled(make: Callable[..., Any]) -> None:
    assert type(make().checkpoint_io) is WholeFileIO
    own = TorchCheckpointIO()
    assert make(checkpoint_io=own).checkpoint_io is own
    wrapper = AsyncCheckpointIO()
    strategy = make(checkpoint_io=wrapper)
    assert strategy.checkpoint_io is wrapper
    assert type(wrapper.checkpoint_io) is WholeFileIO
    assert strategy.checkpoint_io.checkpoint_io is wrapper.checkpoint_io
    assert make(checkpoint_io=AsyncCheckpointIO(own)).checkpoint_io.checkpoint_io is own
    strategy.checkpoint_io = own
    assert strategy.checkpoint_io is own


def test_a_plugin_of_the_trainer_is_taken() -> None:
    own = TorchCheckpointIO()
    assert trainer(1, sml.SwiftMoEStrategy(), plugins=[own]).strategy.checkpoint_io is own
    assert Fabric(accelerator="cpu", devices=1, strategy="swiftmoe", plugins=[own]).strategy.checkpoint_io is own


@contextmanager
def full_on(rank: int) -> Iterator[None]:
    """Meanwhile the disk of one rank is full."""
    save = torch.save
    if int(os.environ["RANK"]) == rank:
        torch.save = fail_half_way  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.save = save


def save_by_trainer(path: str, directory: bool, asynchronous: bool = False) -> None:
    strategy = sml.SwiftMoEStrategy(save_distributed_checkpoint=directory)
    runner = trainer(2, strategy, max_epochs=1, plugins=[AsyncCheckpointIO()] if asynchronous else [])
    runner.fit(Model(), loader(2), loader(2))
    runner.save_checkpoint(path)
    if asynchronous:
        # The first file is whole before the disk is full.
        wait_for_writer(runner)
    with full_on(int(directory)):
        runner.save_checkpoint(path)
        if asynchronous:
            wait_for_writer(runner)
            # The plugin says so when it is called again.
            runner.save_checkpoint(path)


def wait_for_writer(runner: L.Trainer) -> None:
    writer: Any = runner.strategy.checkpoint_io
    if writer._executor is not None:
        writer._executor.shutdown()
        writer._executor = None


def save_by_fabric(path: str) -> None:
    fabric = Fabric(accelerator="cpu", strategy="swiftmoe", devices=2)
    fabric.launch()
    model = fabric.setup(models.build())
    fabric.save(path, {"model": model})
    with full_on(0):
        fabric.save(path, {"model": model})


@pytest.mark.parametrize(
    ("save", "options"), [(save_by_trainer, (False,)), (save_by_trainer, (False, True)), (save_by_fabric, ())]
)
def test_a_file_that_cannot_be_written_is_an_error_on_every_rank(
    save: Callable[..., None], options: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    for error in rank_errors(save, 2, str(path), *options, init=False):
        assert f"OSError: cannot write the checkpoint '{path}' (rank 0: OSError: [Errno 28] No space left on" in error
        assert "Make room, choose another folder, or leave out what cannot be pickled." in error
    assert WholeFileIO().load_checkpoint(path)
    assert names(tmp_path) == ["run.ckpt"]


def test_a_directory_of_which_one_rank_cannot_write_its_part_is_an_error_on_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    for error in rank_errors(save_by_trainer, 2, str(path), True, init=False):
        assert f"OSError: cannot write the checkpoint '{path}' (rank 1: [Errno 28] No space left on device)" in error
        assert "Nothing of it is left, and one that was there still is" in error
    assert names(tmp_path) == ["run.ckpt"]
    run_ranks(resume, 2, str(path), init=False)


def resume(path: str) -> None:
    runner = trainer(2, max_epochs=2)
    runner.fit(Model(), loader(2), loader(2), ckpt_path=path)
    assert runner.current_epoch == 2


def test_a_file_that_is_not_there_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for error in rank_errors(resume, 2, str(tmp_path / "none.ckpt"), init=False):
        assert f"FileNotFoundError: Checkpoint file not found: {tmp_path}/none.ckpt" in error


def test_a_folder_that_cannot_be_made_is_named_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for error in rank_errors(save_below, 2, str(tmp_path / "file" / "run.ckpt"), init=False):
        assert "cannot write the checkpoint" in error
        assert "Error: [Errno " in error


def save_below(path: str) -> None:
    runner = trainer(2, max_epochs=1)
    runner.fit(Model(), loader(2), loader(2))
    runner.save_checkpoint(path)
