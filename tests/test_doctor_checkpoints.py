"""`swiftmoe doctor CHECKPOINT` finds what is damaged, unfinished or missing, file by file."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import swiftmoe_lightning as sml
from swiftmoe_lightning.cli import app
from swiftmoe_lightning.engine.checkpoint import save_directory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def doctor(path: Path | str, status: int, *argv: str) -> list[str]:
    result = CliRunner().invoke(app, ["doctor", str(path), *argv])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output.splitlines()


def flip(path: Path, part: bytes = b"") -> None:
    data = bytearray(path.read_bytes())
    data[data.index(part) if part else len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"weights": torch.ones(1000)}, tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    module = sml.MoE(4, 3, 2)
    save_directory(tmp_path / "run.ckpt", module, [torch.optim.AdamW(module.parameters())], {"epoch": 3})
    return tmp_path / "run.ckpt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What Accelerate and transformers put into theirs."""
    made = tmp_path / "checkpoint-2"
    made.mkdir()
    save_file({"weights": torch.ones(3)}, made / "model.safetensors")
    torch.save({"state": torch.ones(1000)}, made / "optimizer.bin")
    torch.save({"state": 1}, made / "random_states_0.pkl")
    torch.save({"layers": torch.ones(3)}, made / "swiftmoe.pt")
    (made / "trainer_state.json").write_text("{}")
    return made


def test_a_file_is_one_line(file: Path) -> None:
    assert doctor(file, 0) == [f"{file}, {file.stat().st_size:,} bytes: ok"]
    flip(file)
    (line,) = doctor(file, 1)
    assert line.startswith(f"{file}, {file.stat().st_size:,} bytes: damaged (its record 'run/data/0' does not hold")


@pytest.mark.parametrize("content", [b"", bytes(4096), b"PJ\x03\x04" + bytes(100), b"PK\x03\x04" + bytes(100)])
def test_what_torch_cannot_have_written_is_damaged(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    (line,) = doctor(file, 1)
    assert "bytes: damaged (" in line


def test_a_cut_file_is_damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])
    assert ": damaged (its list of records does not hold what was written" in doctor(file, 1)[0]


def test_files_without_checksums_are_not_verified(file: Path) -> None:
    torch.save({"weights": torch.ones(9)}, file, _use_new_zipfile_serialization=False)
    assert doctor(file, 0)[0].endswith("bytes: not verified (it carries no checksums)")


def test_a_directory_is_a_line_a_file(directory: Path) -> None:
    lines = [line.removeprefix(f"{directory}/") for line in doctor(directory, 0)]
    assert [line.split(",")[0] for line in lines] == ["meta.pt", ".metadata", "__0_0.distcp"]
    assert all(line.endswith("bytes: ok") for line in lines)
    actual = json.loads("\n".join(doctor(directory, 0, "--json")))
    assert [finding["state"] for finding in actual] == ["ok", "ok", "ok"]
    assert actual[2]["size"] == (directory / "__0_0.distcp").stat().st_size


def weights_of(directory: Path) -> bytes:
    torch.manual_seed(0)
    weights: Any = sml.MoE(4, 3, 2).experts.down_proj
    return bytes(weights.detach().numpy().tobytes())


def test_damage_in_a_directory_is_named(directory: Path) -> None:
    flip(directory / "__0_0.distcp", weights_of(directory))
    (bad,) = [line for line in doctor(directory, 1) if not line.endswith("bytes: ok")]
    assert "__0_0.distcp," in bad
    assert "damaged ('model.experts.down_proj' in __0_0.distcp is damaged: its record 'archive/data/0'" in bad
    flip(directory / ".metadata")
    lines = doctor(directory, 1)
    assert "damaged (ValueError: its SHA-256 is not the one in meta.pt)" in lines[1]
    assert lines[2].endswith("not verified (no .metadata says what is in it)")


def test_a_slice_whose_beginning_is_damaged_is_found(directory: Path) -> None:
    flip(directory / "__0_0.distcp", b"PK\x03\x04")
    assert "is damaged: it does not begin as what torch.save writes)" in doctor(directory, 1)[2]


def test_a_directory_without_checksums_is_not_verified(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save_directory(tmp_path / "run.ckpt", sml.MoE(4, 3, 2), [], {})
    finally:
        torch.serialization.set_crc32_options(True)
    assert doctor(tmp_path, 0)[2].endswith("not verified (it carries no checksums)")


def test_damage_of_the_meta_file_leaves_the_index_unverified(directory: Path) -> None:
    flip(directory / "meta.pt", b"epoch")
    lines = doctor(directory, 1)
    assert "meta.pt" in lines[0]
    assert "damaged" in lines[0]
    assert lines[1].endswith("not verified (no sound meta.pt holds its checksum)")
    assert lines[2].endswith("bytes: ok")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta.pt", "meta.pt: unfinished (it is written last"),
        (".metadata", ".metadata: missing (it says what is where in the shards)"),
        ("__0_0.distcp", "__0_0.distcp: missing (.metadata has"),
    ],
)
def test_what_a_directory_lacks_is_named(name: str, message: str, directory: Path) -> None:
    (directory / name).unlink()
    assert any(message in line for line in doctor(directory, 1))


def test_an_index_that_executes_something_is_not_executed(directory: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    (directory / ".metadata").write_bytes(pickle.dumps(Touch()))
    (directory / "meta.pt").unlink()
    assert any(".metadata asks for" in line for line in doctor(directory, 1))
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_accelerate_or_the_trainer(folder: Path) -> None:
    lines = [line.removeprefix(f"{folder}/") for line in doctor(folder, 0)]
    assert [line.split(",")[0] for line in lines] == sorted(path.name for path in folder.iterdir())
    assert [line.split(": ")[1] for line in lines] == [
        "not verified (safetensors carry no checksum)",
        "ok",
        "ok",
        "ok",
        "not verified (it carries no checksums)",
    ]
    flip(folder / "swiftmoe.pt", b"layers")
    (bad,) = [line for line in doctor(folder, 1) if "damaged" in line]
    assert "swiftmoe.pt" in bad


def test_what_a_kill_leaves_is_unfinished(folder: Path, file: Path) -> None:
    (folder / "last.ckpt.partial").write_bytes(b"half")
    (folder / "other.ckpt.partial").mkdir()
    bad = [line for line in doctor(folder, 1) if "unfinished (a run was stopped while it saved" in line]
    assert len(bad) == 2


def test_links_are_followed_to_files_alone(folder: Path, file: Path) -> None:
    (folder / "last.ckpt").symlink_to(file)
    (folder / "up").symlink_to("..")
    lines = doctor(folder, 0)
    assert any("last.ckpt, " in line and line.endswith("bytes: ok") for line in lines)
    assert any("up: not verified (a link to the folder ..)" in line for line in lines)
    file.unlink()
    assert any("last.ckpt: missing (it links to nothing)" in line for line in doctor(folder, 1))


def test_what_is_no_checkpoint_is_one_line_and_nothing_hangs(tmp_path: Path) -> None:
    (line,) = doctor(tmp_path / "none.ckpt", 1)
    assert line.endswith("none.ckpt: missing (there is no such file)")
    os.mkfifo(tmp_path / "fifo.ckpt")
    for path in (tmp_path / "fifo.ckpt", Path("/dev/zero")):
        assert doctor(path, 1) == [f"{path}: unreadable (it is neither a file nor a folder)"]
    assert doctor(tmp_path, 0) == [f"{tmp_path}/fifo.ckpt: not verified (it is neither a file nor a folder)"]
    (tmp_path / "empty").mkdir()
    assert doctor(tmp_path / "empty", 1) == [f"{tmp_path}/empty: missing (the folder is empty)"]


def test_a_name_need_not_be_unicode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.ckpt"
    with open(path, "wb") as stream:
        torch.save(nn.Linear(2, 2).state_dict(), stream)
    assert doctor(tmp_path, 0)[0].endswith("bytes: ok")


def test_what_the_system_refuses_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert doctor(folder, 2) == [f"swiftmoe doctor: [Errno 13] Permission denied: '{folder}'"]
