"""How a Lightning strategy may start its processes."""

from __future__ import annotations


def refuse_start_method(start_method: str) -> None:
    """Refuse one that would have to bring expert shards back to the process that started the others.

    Raises:
        ValueError: for any but "popen".
    """
    if start_method != "popen":
        raise ValueError(
            f"strategy='swiftmoe' cannot start its processes with start_method={start_method!r}: expert shards do not "
            "travel back through it. Use start_method='popen' (the default), or torchrun."
        )
