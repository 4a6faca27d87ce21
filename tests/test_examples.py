from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import only_by_day, run_script

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


# Their likes run in other tests, too.
NIGHTLY = {
    "expert_groups.py",
    "go_on_after_a_lost_node.py",
    "hf_expert_parallel.py",
    "lightning_cli.py",
    "narrow_tokens.py",
    "resume_by_itself.py",
    "resume_other_world_size.py",
    "sharded_evaluation.py",
}


@pytest.mark.parametrize("path", only_by_day({p.name: p for p in EXAMPLES}, *({p.name for p in EXAMPLES} - NIGHTLY)))
def test_the_example_runs(path: Path, tmp_path: Path) -> None:
    said = run_script(sys.executable, str(path), cwd=tmp_path).stderr
    # No warning of this package, and none of torch that it causes; Lightning's own stay.
    assert not re.search(r"swiftmoe_lightning/\S+\.py:\d+", said), said
    assert not re.search(r"W\d{4} .*torch/(?!distributed/elastic)", said), said


@pytest.mark.parametrize(
    ("script", "launcher"), [("expert_groups_torchrun.sh", "torchrun"), ("expert_groups.sbatch", "srun")]
)
def test_launch_scripts_give_the_example_options_that_it_takes(script: str, launcher: str, tmp_path: Path) -> None:
    stub = tmp_path / launcher
    stub.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)
    settings = {"NODES": "2", "HEAD": "first:29500", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    settings["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    folder = EXAMPLES[0].parent
    done = subprocess.run(["bash", folder / script], env=settings, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    example = words.index("examples/expert_groups.py")
    given = runpy.run_path(str(folder / "expert_groups.py"))["options"](words[example + 1 :])
    assert (given.accelerator, given.num_nodes, given.devices, given.group_size) == ("gpu", 2, 8, 8)


def test_the_notebook_is_stored_without_outputs_and_runs(tmp_path: Path) -> None:
    path = shutil.copy(EXAMPLES[0].parent / "tour.ipynb", tmp_path)
    assert not any(cell.get("outputs") for cell in json.loads(Path(path).read_text())["cells"])
    execute = Path(sys.executable).with_name("jupyter-execute")
    run_script(str(execute), "--inplace", "tour.ipynb", cwd=tmp_path, TOUR_STEPS="40")
    outputs = Path(path).read_text()
    for rule in ("static", "symi", "balanced"):
        assert re.search(rf"{rule} +dropped +[\d.]+% of the tokens, loss", outputs)
    assert "Tensor (8, 32, 64)" in outputs
