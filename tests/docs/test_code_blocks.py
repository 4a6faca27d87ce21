"""Python on the documentation's pages runs, and commands on them are such as their parsers take."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import swiftmoe_lightning as sml
from swiftmoe_lightning.cli import app
from tests.docs.pages import PAGES, ROOT, Command, blocks_of, commands_of
from tests.helpers import run_ranks

PYTHON = {page: [block for block in blocks_of(page.read_text()) if block.language == "python"] for page in PAGES}
OTHER_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
COMMANDS = sorted({command for page in [*PAGES, *OTHER_PAGES] for command in commands_of(page.read_text())})
QUICKSTART = [
    command.words[1:]
    for command in commands_of((ROOT / "docs/quickstart.md").read_text())
    if command.is_whole and command.words[0] == "swiftmoe"
]
# What makes `swiftmoe train` short.
SMALL = "--steps 4 --layers 1 --dim 32 --hidden-dim 16 --experts 4 --seq-len 16 --batch-size 8 --data text.txt"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON[page]], ids=name_of)
def test_python_blocks_compile_and_name_what_there_is(page: Path) -> None:
    for block in PYTHON[page]:
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("sml."):
                assert named(node) is not None
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sml."):
                inspect.signature(named(node.func)).bind_partial(**{k.arg: None for k in node.keywords if k.arg})


def named(node: ast.expr) -> Any:
    """What an expression like `sml.accelerate.prepare` names."""
    value: Any = sml
    for name in ast.unparse(node).split(".")[1:]:
        value = getattr(value, name)
    return value


def run_pages(folder: Path) -> None:
    """Each page's blocks one after the other, as a reader would paste them."""
    os.chdir(folder)
    for page, blocks in PYTHON.items():
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks:
            if not block.not_run:
                exec(compile(block.code, name_of(page), "exec"), names)


def test_python_blocks_run(tmp_path: Path) -> None:
    # In one process, for most of the time is its start.
    run_ranks(run_pages, 1, tmp_path, init=False)


def run_quickstart(folder: Path) -> None:
    os.chdir(folder)
    Path("text.txt").write_text(
        "The quick brown fox jumps over the lazy dog; what it thinks of it nobody knows.\n" * 20
    )
    for command, *words in QUICKSTART:
        result = CliRunner().invoke(app, [command, *words, *(SMALL.split() if command == "train" else [])])
        assert result.exit_code == 0, result.output


def test_the_quickstarts_commands_end_with_its_pictures(tmp_path: Path) -> None:
    assert [words[0] for words in QUICKSTART] == ["doctor", "train", "report", "plan", "plan", "scale"]
    run_ranks(run_quickstart, 1, tmp_path, init=False)
    assert (tmp_path / "runs/comparison.png").stat().st_size > 20_000
    assert (tmp_path / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words))
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_command_is_one_that_its_parser_takes(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = command.words
    if program == "python":
        _, program, *words = words
    if program in ("swiftmoe", "swiftmoe_lightning"):
        parse_as_click(words, command.is_whole)
    else:
        parse_as_argparse(
            {"torchrun": "torch.distributed.run"}.get(program, program), words, command.is_whole, monkeypatch
        )


def parse_as_click(words: list[str], is_whole: bool) -> None:
    group: Any = typer.main.get_command(app)
    for name in words[:1]:
        command = group.commands[name]
        if is_whole:
            command.make_context(name, words[1:])
        else:
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= {*options, "--help"}


class Parsed(BaseException):
    """Raised in place of going on with what was parsed. No `except Exception` on the way takes it for an error."""


def parse_as_argparse(name: str, words: list[str], is_whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the module `name`, and stop it where it has parsed its arguments."""
    is_any = name.split(".")[-1].isupper()
    if is_any or name.startswith("tests."):
        # benchmarks.NAME stands for any of them; those of tests rewrite pages, and parse nothing.
        assert not words
        assert is_any or find_spec(name)
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args: Any, **kwargs: Any) -> None:
        parse_args(*args, **kwargs)
        raise Parsed

    def refuse(_: argparse.ArgumentParser, message: str) -> None:
        assert not is_whole, message
        assert "required" in message or "expected" in message, message
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(Parsed):
        runpy.run_module(name, run_name="__main__")
