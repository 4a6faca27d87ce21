"""An extension of griffe, which reads docstrings: names and their meanings in two columns become a list.

`loads`     [U, L, W] int64, assignments that each rank computed     ->     - `loads`: [U, L, W] int64, ...
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAME = re.compile(r"^(`[^`]+`|[a-z][a-z, ]*[a-z]) {2,}(?=\S)", flags=re.MULTILINE)


class DocstringLists(griffe.Extension):
    """Rewrites such lines before the docstring is parsed. Lines under them, further to the right, stay theirs."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the object's docstring, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = _NAME.sub(r"- \1: ", obj.docstring.value)
