from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers import run_script

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_the_example_runs(path: Path, tmp_path: Path) -> None:
    run_script(sys.executable, str(path), cwd=tmp_path)
