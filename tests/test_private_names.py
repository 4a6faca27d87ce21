"""Names that other libraries do not promise: a version without them is an error where it is imported, with the fix."""

from __future__ import annotations

import importlib
import re
import sys

import pytest

from swiftmoe_lightning.private_names import check_names


class Owner:
    _there = 1


def test_names_that_are_there_are_taken() -> None:
    check_names("torch", {Owner: ["_there"], sys: ["version_info"]}, "torch>=2.11")


def test_what_is_missing_is_named_with_the_fix() -> None:
    message = r"torch \S+ lacks Owner\._gone, sys\._neither\. Install one that has them: pip install 'torch>=2\.11'"
    with pytest.raises(ImportError, match=message):
        check_names("torch", {Owner: ["_there", "_gone"], sys: ["_neither"]}, "torch>=2.11")


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("distributed", "torch.distributed.distributed_c10d", "_get_default_store"),
        ("strategies", "lightning.pytorch.overrides.distributed", "_sync_module_states"),
    ],
)
def test_each_list_is_checked_when_its_folder_is_imported(
    module: str, owner: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = importlib.import_module(f"swiftmoe_lightning.{module}.private")
    monkeypatch.delattr(importlib.import_module(owner), name)
    with pytest.raises(ImportError, match=re.escape(f"lacks {owner}.{name}.")):
        importlib.reload(private)
