"""The page lists every wait and copy that is left in a training step."""

from __future__ import annotations

import ast

import pytest

from tests.host_copies import ELSEWHERE, IN_A_STEP, calls_in, found, parts, table


def test_every_copy_and_wait_is_known() -> None:
    assert found().keys() == IN_A_STEP.keys() | ELSEWHERE.keys(), "say in tests/host_copies.py what copies or waits"


def test_the_page_lists_them() -> None:
    assert parts()[1] == table(), "run python -m tests.host_copies"


@pytest.mark.parametrize(
    "call", ["x.cpu()", "x.item()", "to_device(d, a)", "torch.tensor(1, device=d)", "torch.from_numpy(a).to(d)"]
)
def test_a_copy_is_found(call: str) -> None:
    source = f"class Layer:\n    def step(self):\n        return {call}"
    assert list(calls_in(ast.parse(source))) == [("Layer.step", 3)]
    assert not list(calls_in(ast.parse("torch.tensor(1)")))
