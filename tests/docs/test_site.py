"""The site builds without a warning, as of a dead link or a page outside the navigation, and is complete in itself."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import swiftmoe_lightning as sml

ROOT = Path(__file__).parent.parent.parent


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    return subprocess.run(command, cwd=config.parent, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    # A link to follow is `<a href>`; all that is loaded is `src`, `<link href>`, or a style's `url()`.
    loads = re.compile(r"""\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?(?:https?:)?//|url\(["']?(?:https?:)?//""")
    for path in [*pages, *site.rglob("*.css")]:
        assert not loads.search(path.read_text()), path


def test_every_public_name_has_an_entry_and_a_docstring(site: Path) -> None:
    pages = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    for name in sml.__all__:
        assert f'id="swiftmoe_lightning.{name}"' in pages, f"docs/api has no ::: swiftmoe_lightning.{name}"
        assert inspect.getdoc(getattr(sml, name)), name
    assert 'id="swiftmoe_lightning.accelerate.prepare"' in pages


def test_files_of_the_repository_that_pages_link_to_are_part_of_the_site(site: Path) -> None:
    table = (site / "guarantees.html").read_text()
    linked = re.findall(r'href="(tests/[^"#]+)"', table)
    assert "tests/engine/test_matches_dense_reference.py.txt" in linked
    assert all((site / link).is_file() for link in linked)
    # From there back into docs/, and to a picture beside it.
    benchmarks = (site / "benchmarks/readme.html").read_text()
    assert 'href="../convergence.html"' in benchmarks
    assert (site / "benchmarks/results/placement_frontier.png").is_file()


@pytest.mark.parametrize("link", ["../missing.py", "missing.md", "../LICENSE"])
def test_a_link_to_what_does_not_exist_fails_the_build(link: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n[link]({link})\n")
    (tmp_path / "LICENSE").write_text("Free.\n")
    settings = {"site_name": "test", "hooks": [str(ROOT / "docs/repository_files.py")], "plugins": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    exists = link == "../LICENSE"
    assert (built.returncode == 0) == exists, built.stderr
    assert exists or f"'{link}'" in built.stderr
    assert (tmp_path / "site/LICENSE.txt").is_file() == exists
