"""An untrusted directory executes nothing when it is read, and a damaged one is an error that says so."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.checkpoint import load_meta, load_model, load_optimizers, save_directory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    module = sml.MoE(4, 3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    save_directory(tmp_path / "saved.ckpt", module, [optimizer], {"epoch": 3})
    return tmp_path / "saved.ckpt", module, optimizer


def test_a_directory_goes_there_and_back(saved: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    path, module, optimizer = saved
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    load_model(path, module)
    load_optimizers(path, module, [optimizer])
    assert load_meta(path) == {"epoch": 3}
    assert all(value.equal(expected[name]) for name, value in module.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == ["saved.ckpt"]


def test_crafted_metadata_is_refused_and_not_executed(
    saved: tuple[Path, nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    path, module, optimizer = saved
    (path / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"its \.metadata asks for .*, which no checkpoint needs"):
        load_model(path, module)
    with pytest.raises(ValueError, match=r"which no checkpoint needs"):
        load_optimizers(path, module, [optimizer])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04\x95", pickle.dumps([1])])
def test_metadata_that_is_missing_or_damaged_is_named(
    saved: tuple[Path, nn.Module, torch.optim.Optimizer], content: bytes | None
) -> None:
    path, module, _ = saved
    (path / ".metadata").unlink()
    if content is not None:
        (path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the checkpoint '.*saved\.ckpt'"):
        load_model(path, module)


def test_a_directory_that_was_never_finished_is_named(saved: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    path, _, _ = saved
    (path / "meta.pt").unlink()
    with pytest.raises(ValueError, match=r"stopped before it had finished"):
        load_meta(path)


def test_a_directory_that_cannot_be_written_leaves_the_old_one(
    saved: tuple[Path, nn.Module, torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, module, optimizer = saved

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint '.*saved\.ckpt' \(.*No space left on device"):
        save_directory(path, module, [optimizer], {"epoch": 4})
    assert load_meta(path) == {"epoch": 3}
    assert [p.name for p in path.parent.iterdir()] == ["saved.ckpt"]


def test_a_kill_between_the_two_renames_leaves_one_that_the_next_save_takes_back(
    saved: tuple[Path, nn.Module, torch.optim.Optimizer],
) -> None:
    path, module, optimizer = saved
    previous = path.with_name("saved-previous.ckpt")
    path.rename(previous)
    assert load_meta(previous) == {"epoch": 3}
    save_directory(path, module, [optimizer], {"epoch": 4})
    assert load_meta(path) == {"epoch": 4}
    assert not previous.exists()
