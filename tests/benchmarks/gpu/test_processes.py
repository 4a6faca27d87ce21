"""A task whose process fails loses its own result alone."""

from __future__ import annotations

import math
import os
import time
from functools import partial

import pytest

from benchmarks.gpu.processes import LATE, results_of


@pytest.mark.nightly
def test_a_process_that_dies_or_hangs_takes_nothing_with_it() -> None:
    tasks = [partial(math.sqrt, 4), partial(os._exit, 3), partial(math.sqrt, -1), partial(time.sleep, 100)]
    first, died, raised, late = results_of(tasks, 4, seconds=15)
    assert first == (2.0, None)
    assert died == (None, "its process died with exit code 3")
    assert raised[0] is None
    assert str(raised[1]).startswith("ValueError")
    assert late == (None, LATE)
