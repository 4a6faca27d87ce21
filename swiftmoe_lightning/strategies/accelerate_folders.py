"""Folders of `accelerator.save_state`: whole experts, and beside Accelerate's own files where they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from swiftmoe_lightning.engine import SwiftMoEEngine
from swiftmoe_lightning.engine.checkpoint import full_state, read_file

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE_FILE: Final = "swiftmoe.pt"


def gather_state_dicts(accelerator: Accelerator) -> None:
    """Let `accelerator.get_state_dict`, and all that saves by it, give whole experts, on every process."""
    get_state_dict: Callable[..., Any] = accelerator.get_state_dict

    @functools.wraps(get_state_dict)
    def get_whole(*args: Any, **kwargs: Any) -> Any:
        return full_state(get_state_dict(*args, **kwargs), keep=True)

    accelerator.get_state_dict = get_whole


def add_to_folders(accelerator: Accelerator, prepared: nn.Module, engine: SwiftMoEEngine) -> None:
    """Let `save_state` keep where the experts of `prepared` were, and `load_state` read weights into masters.

    The user's own hooks may take weights out of the folder, and give them back: those of all models, or of none.
    """

    def state_file(folder: str) -> Path:
        index = next(i for i, model in enumerate(accelerator._models) if model is prepared)
        return Path(folder, _numbered(STATE_FILE, index))

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            torch.save(engine.state_dict(), state_file(folder))

    def load(models: list[nn.Module], folder: str) -> None:
        _load_models(models, Path(folder))
        # A folder of a plain run has no such file: placements then start from nothing.
        if state_file(folder).exists():
            engine.load_state_dict(read_file(state_file(folder)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _load_models(models: list[nn.Module], folder: Path) -> None:
    """Read all models' weights, and tell Accelerate that it is done: its own loader looks at storages, which masters do
    not show. Where the folder has none of them, the user's hooks have, or Accelerate says what it lacks."""
    found = [path for index in range(len(models)) if (path := _weights_file(folder, index)) is not None]
    if not found:
        return
    if len(found) < len(models):
        raise ValueError(
            f"{folder} holds the weights of {len(found)} models ({', '.join(path.name for path in found)}), and "
            f"{len(models)} were prepared. Let your hooks take the weights of all models at save_state, or of none."
        )
    for model, path in zip(models, found, strict=True):
        load_whole(model, path)
    models.clear()


def _weights_file(folder: Path, index: int) -> Path | None:
    paths = (folder / _numbered(name, index) for name in ("model.safetensors", "pytorch_model.bin"))
    return next((path for path in paths if path.exists()), None)


def _numbered(name: str, index: int) -> str:
    """As Accelerate numbers the files of several models."""
    stem, _, suffix = name.partition(".")
    return f"{stem}_{index}.{suffix}" if index else name


def load_whole(model: nn.Module, path: Path) -> None:
    """Read what Accelerate wrote of a model. No communication.

    Raises ValueError, naming the keys, where the file and the model differ.
    """
    from safetensors.torch import load_file

    state = load_file(path) if path.suffix == ".safetensors" else read_file(path)
    found = model.load_state_dict(state, strict=False)
    live = model.state_dict(keep_vars=True)
    # Of tied weights a file holds one.
    held = {id(live[name]) for name in state if name in live}
    missing = [name for name in found.missing_keys if id(live[name]) not in held]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{path} belongs to another model: it lacks {missing}, and holds {found.unexpected_keys} that this one "
            "does not have. Build the model that was saved, or load another folder."
        )
