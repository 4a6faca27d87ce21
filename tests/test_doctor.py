from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from swiftmoe_lightning import doctor
from swiftmoe_lightning.cli import app
from swiftmoe_lightning.ops import backend


def run(*argv: str, width: str = "400") -> str:
    result = CliRunner().invoke(app, ["doctor", *argv], env={"COLUMNS": width})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a new GPU and one that is too old for the kernels; as far as torch says."""
    gpus = [
        SimpleNamespace(name="NVIDIA New", major=9, minor=0, total_memory=80 * 2**30),
        SimpleNamespace(name="NVIDIA Old", major=7, minor=0, total_memory=16 * 2**30),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[device.index].name)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (gpus[device.index].major, gpus[device.index].minor)
    )
    # The two are remembered by device.
    backend._backend_on.cache_clear()
    yield
    backend._backend_on.cache_clear()


def test_json_has_versions_devices_and_operations() -> None:
    actual = json.loads(run("--json"))
    assert actual["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "triton", "lightning", "accelerate", "transformers", "swiftmoe-lightning"} < set(
        actual["versions"]
    )
    assert actual["devices"][0]["device"] == "cpu"
    assert "gloo" in actual["process_group_backends"]
    on_cpu = [entry for entry in actual["operations"] if entry["device"] == "cpu"]
    assert len(on_cpu) == 3 * 4
    assert {entry["dtype"] for entry in on_cpu} == {"float32", "bfloat16", "float16", "float64"}
    assert {entry["backend"] for entry in on_cpu} == {"torch"}
    assert all("need an NVIDIA GPU" in entry["reason"] for entry in on_cpu)


def test_tables_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.metadata.version

    def without_triton(name: str) -> str:
        if name == "triton":
            raise doctor.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without_triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = run()
    assert "not installed" in output
    assert "No GPU is seen by torch." in output
    assert "float32, bfloat16, float16, float64" in output
    # A narrow terminal wraps, and cuts nothing.
    assert "NVIDIA" in run(width="60")


@pytest.mark.usefixtures("_two_gpus")
def test_each_gpu_has_its_own_backends() -> None:
    pytest.importorskip("triton")
    actual = json.loads(run("--json"))
    assert [device["name"] for device in actual["devices"][1:]] == ["NVIDIA New", "NVIDIA Old"]
    operation_of = {(e["device"], e["operation"].split(" (")[0], e["dtype"]): e for e in actual["operations"]}
    assert operation_of["cuda:0", "layer, fine experts", "bfloat16"]["backend"] == "triton"
    assert operation_of["cuda:0", "layer, coarse experts", "bfloat16"]["backend"] == "torch"
    assert operation_of["cuda:0", "layer, coarse experts", "float32"]["backend"] == "triton"
    assert operation_of["cuda:0", "layer, fine experts", "float64"]["backend"] == "torch"
    old = operation_of["cuda:1", "layer, fine experts", "bfloat16"]
    assert old["reason"] == "NVIDIA Old has compute capability 7.0: the Triton kernels need 8.0 or more."
    table = run()
    assert "80.0 GiB" in table
    assert "9.0" in table
