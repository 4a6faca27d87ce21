"""What `swiftmoe doctor` prints: versions, devices and the backend of each operation; a launch; a checkpoint."""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from swiftmoe_lightning.analysis.report.page_text import path_text
from swiftmoe_lightning.distributed.backends import available_backends
from swiftmoe_lightning.distributed.launch_check import LaunchReport
from swiftmoe_lightning.engine.checkpoint_verification import verify_checkpoint
from swiftmoe_lightning.ops import backend

_LIBRARIES: Final = ("swiftmoe-lightning", "torch", "triton", "lightning", "accelerate", "transformers")
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Name -> (mean rows of an expert, hidden dim, top-k): two published models on 8,192 tokens.
_SHAPES: Final = {
    "layer, coarse experts (8, hidden 14336, top 2)": (2048, 14336, 2),
    "layer, fine experts (64, hidden 1024, top 8)": (1024, 1024, 8),
}


def examine() -> dict[str, Any]:
    """What is installed, which devices there are, and by which backend each operation runs on them.

    Returns:
        JSON-able. versions: name -> version, None if not installed. devices: with memory in bytes.
        process_group_backends: names. operations: one entry for each device, operation and dtype, with the backend's
        name and the reason.
    """
    devices = _devices()
    return {
        "versions": _versions(),
        "devices": devices,
        "process_group_backends": available_backends(),
        "operations": [entry for device in devices for entry in _operations(torch.device(device["device"]))],
    }


def print_findings(findings: dict[str, Any]) -> None:
    """What `examine` returned, as tables on standard output."""
    console = Console()
    versions = _table("library", "version")
    for name, version in findings["versions"].items():
        versions.add_row(name, version or "not installed")
    console.print(versions)
    devices = _table("device", "name", "capability", "memory")
    for device in findings["devices"]:
        memory = device["memory"]
        size = "" if memory is None else f"{memory / 2**30:.1f} GiB"
        devices.add_row(device["device"], device["name"], device["capability"] or "", size)
    console.print(devices)
    if len(findings["devices"]) == 1:
        console.print("No GPU is seen by torch.\n")
    console.print(f"Process-group backends: {', '.join(findings['process_group_backends']) or 'none'}.\n")
    console.print(_operation_table(findings["operations"]))


def print_checkpoint(path: Path, as_json: bool) -> bool:
    """Check a checkpoint: one line for each of its files, as it is read; or JSON, at the end.

    Args:
        path: of the checkpoint, a file or a folder.
        as_json: print JSON only.

    Returns:
        Whether no file is bad.
    """
    is_good, entries = True, []
    for finding in verify_checkpoint(path):
        is_good &= not finding.is_bad
        name = path_text(finding.path)
        if as_json:
            entries.append({"path": name, "size": finding.size, "state": finding.state, "why": finding.why})
        else:
            size = "" if finding.size is None else f", {finding.size:,} bytes"
            print(f"{name}{size}: {finding.state}{f' ({finding.why})' if finding.why else ''}", flush=True)
    if as_json:
        print(json.dumps(entries, indent=2))
    return is_good


def print_launch(report: LaunchReport, as_json: bool) -> None:
    """The ranks of a launch, the speed of their links, and what is wrong, with the fix; or all of it as JSON.

    Args:
        report: from `check_launch`.
        as_json: print JSON only.
    """
    if as_json:
        print(json.dumps(asdict(report), indent=2))
        return
    table = _table("rank", "host", "address", "backend", "GPU", "torch", "NCCL", "lightning", "this package")
    for facts in report.ranks:
        gpu = "none" if facts.gpu is None else f"{facts.local_rank}: {facts.gpu_name}"
        versions = [facts.versions[name] or "none" for name in ("torch", "NCCL", "lightning", "swiftmoe-lightning")]
        table.add_row(str(facts.rank), facts.host, facts.host_address or "none", facts.backend, gpu, *versions)
    console = Console()
    console.print(table)
    for link, speed in report.speeds.items():
        console.print(f"A rank sends {speed / 1e9:.3g} GB/s {link} {'hosts' if link == 'between' else 'its host'}.\n")
    for finding in report.findings:
        kind = "Problem" if finding.is_problem else "Slow"
        console.print(f"{kind}: {finding.what}\n  Fix: {finding.fix}\n", markup=False, soft_wrap=True)
    if not report.findings:
        console.print(f"No problem found: {report.world_size} of {report.world_size} ranks came, and fit together.")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    built_for = {"CUDA of torch": torch.version.cuda, "ROCm of torch": torch.version.hip}
    return versions | {name: version for name, version in built_for.items() if version is not None}


def _devices() -> list[dict[str, Any]]:
    """The CPU first, then every accelerator; a capability, such as "9.0", is an NVIDIA or AMD GPU's."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": cpu, "capability": None, "memory": None}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            gpu = {"device": f"cuda:{index}", "name": properties.name, "capability": capability}
            devices.append(gpu | {"memory": properties.total_memory})
    elif (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        for index in range(torch.accelerator.device_count()):
            other = {"device": f"{accelerator.type}:{index}", "name": accelerator.type}
            devices.append(other | {"capability": None, "memory": None})
    return devices


def _operations(device: torch.device) -> list[dict[str, str]]:
    entries = []
    for dtype in _DTYPES:
        backends = {"sort, permute, combine, activate, route": backend.choose_backend(device, dtype)}
        for name, (rows_per_slot, hidden_dim, top_k) in _SHAPES.items():
            backends[name] = backend.choose_layer_backend(device, dtype, rows_per_slot, hidden_dim, top_k)
        for operation, chosen in backends.items():
            entry = {"device": str(device), "operation": operation, "dtype": str(dtype).removeprefix("torch.")}
            entries.append(entry | {"backend": chosen.name, "reason": chosen.reason})
    return entries


def _operation_table(entries: list[dict[str, str]]) -> Table:
    """Dtypes with the same backend for the same reason share a row."""
    dtypes_of = defaultdict(list)
    for entry in entries:
        dtypes_of[entry["device"], entry["operation"], entry["backend"], entry["reason"]].append(entry["dtype"])
    table = _table("device", "operation", "dtypes", "backend", "why")
    for (device, operation, name, reason), dtypes in dtypes_of.items():
        table.add_row(device, operation, ", ".join(dtypes), name, reason)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table
