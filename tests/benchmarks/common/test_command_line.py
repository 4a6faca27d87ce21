"""A benchmark's settings as options."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.command_line import add_settings, command_line, setting, settings_of


@dataclass(frozen=True, kw_only=True)
class Sizes:
    hidden_dim: int = setting(8, "hidden dim of an expert")
    layers: int = setting(2, "MoE layers")


def test_settings_are_options_with_help_and_default() -> None:
    parser = command_line("some", "What it measures.")
    add_settings(parser, Sizes)
    arguments = parser.parse_args(["--hidden-dim", "16"])
    assert settings_of(arguments, Sizes) == Sizes(hidden_dim=16, layers=2)
    assert arguments.name == "some"
    assert "hidden dim of an expert (default: 8)" in parser.format_help()
