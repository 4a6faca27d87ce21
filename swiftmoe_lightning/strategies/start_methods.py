"""The ways in which a Lightning strategy may start its processes."""

from __future__ import annotations


def refuse_start_method(start_method: str) -> None:
    """Refuse a start method that would have to return expert shards to the parent process.

    Raises:
        ValueError: for any but "popen".
    """
    if start_method != "popen":
        raise ValueError(
            f"strategy='swiftmoe' cannot start its processes with start_method={start_method!r}: expert shards do not "
            "travel back through it. Use start_method='popen' (the default), or torchrun."
        )
