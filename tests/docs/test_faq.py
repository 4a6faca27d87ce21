"""Errors and warnings that name an entry of the FAQ, and the entries."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_every_name_in_a_message_is_an_entry_and_every_entry_is_in_a_message() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "swiftmoe_lightning").rglob("*.py")))
    cited = re.findall(r"\(FAQ: ([a-z-]+)\)(?=\"|$)", source, flags=re.MULTILINE)
    assert len(cited) == source.count("FAQ:"), "a name ends its message, and is on one line: (FAQ: stale-weights)"
    entries = re.findall(r"^### (.+)$", (ROOT / "docs/faq.md").read_text().partition("## Errors and warnings")[2], re.M)
    assert not [name for name, times in Counter(entries).items() if times > 1]
    assert set(cited) == set(entries)
