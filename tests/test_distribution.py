"""What `make dist` builds: the sdist from this folder, and the wheel from the sdist alone."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tarfile
import tomllib
from email import message_from_string
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest
from readme_renderer.markdown import render

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
INFO = f"swiftmoe_lightning-{VERSION}.dist-info"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        f"swiftmoe_lightning-{VERSION}-py3-none-any.whl",
        f"swiftmoe_lightning-{VERSION}.tar.gz",
    ]
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> ZipFile:
    return ZipFile(next(dist.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: ZipFile) -> Message:
    return message_from_string(wheel.read(f"{INFO}/METADATA").decode())


def files_of_the_repository() -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this folder is no checkout, as that of an sdist")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: ZipFile) -> None:
    files = {name for name in files_of_the_repository() if name.startswith("swiftmoe_lightning/")}
    assert {"swiftmoe_lightning/py.typed", "swiftmoe_lightning/analysis/report/page.html"} <= files
    about = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert set(wheel.namelist()) == files | about
    assert wheel.read(f"{INFO}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_holds_the_repository_and_is_small(dist: Path) -> None:
    path = next(dist.glob("*.tar.gz"))
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert names == files_of_the_repository() | {"PKG-INFO"}
    assert path.stat().st_size < 3e6


def test_the_wheels_metadata(wheel: ZipFile, metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"], metadata["Summary"]) == (
        "swiftmoe-lightning",
        VERSION,
        PROJECT["description"],
    )
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2504.19925"]
    assert set(metadata.get_all("Classifier", [])) == set(PROJECT["classifiers"])
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(f"{INFO}/entry_points.txt").decode())
    assert dict(entries["console_scripts"]) == {"swiftmoe": "swiftmoe_lightning.cli:main"}


def test_libraries_have_lower_bounds_and_those_with_private_names_upper_ones(metadata: Message) -> None:
    needed = [text.split(";")[0].strip() for text in metadata.get_all("Requires-Dist", []) if "'dev'" not in text]
    assert len(needed) > 7
    assert [text for text in needed if ">=" not in text] == []
    unbounded = {re.split("[<>=]", text)[0] for text in needed if "<" not in text}
    assert unbounded.isdisjoint({"torch", "lightning", "accelerate", "transformers"})


def test_the_readme_of_the_package_index_is_rendered_without_links_to_files(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "pip install swiftmoe-lightning " in metadata.get_payload()
    html = render(metadata.get_payload())
    assert html is not None
    assert html.count("<table>") == 1
    links = re.findall(r'(?:href|src)="([^"]*)"', html)
    assert "https://arxiv.org/abs/2504.19925" in links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
