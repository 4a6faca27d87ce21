"""Where a result comes from: the commit, the machine, the versions and the command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "benchmarks" / "results"
_LIBRARIES: Final = (
    *("torch", "numpy", "triton", "lightning", "transformers", "deepspeed"),
    *("liger-kernel", "scattermoe", "sonic-moe"),
)


def collect_provenance() -> dict[str, Any]:
    """Commit, date, device, versions and command, JSON-able. Call it before measuring, in the process that was started.

    tree_is_clean: whether the files, results excepted, are those of the commit. In a copy without git's records the
    commit is None, and the tree not clean.
    """
    return {
        "commit": _git("rev-parse", "HEAD"),
        "tree_is_clean": _git("status", "--porcelain", "--", ".", ":!benchmarks/results") == "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **_versions()},
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def write_result(name: str, provenance: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json, one object: `provenance` as "certificate", then the results.

    Returns its path.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"certificate": provenance, **results}, indent=2) + "\n")
    return path


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    # platform.processor() is empty on most Linux systems.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _versions() -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions
