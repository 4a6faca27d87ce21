"""The blocks of code and the commands on the pages of the documentation."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parent.parent.parent
PAGES: Final = sorted((ROOT / "docs").rglob("*.md"))
# Commands of this package, of Python's modules and of torchrun.
_COMMAND: Final = r"(?:\.venv/bin/)?((?:swiftmoe|python -m|torchrun)(?=[\s`]|$)"
_FENCE: Final = r"(?:<!-- not run: (?P<not_run>.+?) -->\n\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$"


class Block(NamedTuple):
    """not_run: the reason in the comment before it, or "". language: behind the first fence, or ""."""

    not_run: str
    language: str
    code: str


class Command(NamedTuple):
    """words: as a shell splits it. is_whole: in a block; in a sentence arguments may be left out."""

    words: tuple[str, ...]
    is_whole: bool


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found) for found in re.findall(_FENCE, page, flags=re.MULTILINE | re.DOTALL)]


def commands_of(page: str) -> list[Command]:
    """What a page tells the reader to type, in order: blocks first."""
    scripts = "\n".join(block.code for block in blocks_of(page) if block.language in ("", "bash"))
    in_blocks = re.findall(
        rf"^(?:\$ )?(?:[A-Z_]+=\S+ )*{_COMMAND}[^#\n]*)", scripts.replace("\\\n", " "), flags=re.MULTILINE
    )
    sentences = re.sub(_FENCE, "", page, flags=re.MULTILINE | re.DOTALL)
    in_sentences = re.findall(rf"`{_COMMAND}[^`]*)`", sentences)
    return [*(_command(line, True) for line in in_blocks), *(_command(line, False) for line in in_sentences)]


def _command(line: str, is_whole: bool) -> Command:
    # "TRACE [TRACE ...] [--option VALUE]" is a command with all of it.
    return Command(tuple(shlex.split(re.sub(r"[][]|\.\.\.", "", line))), is_whole)
