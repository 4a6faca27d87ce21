"""Makes `save_pretrained` gather sharded experts, of which it would write this rank's rows, or wait for ever."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Final

import torch.distributed as dist
from torch import nn

from swiftmoe_lightning.distributed import is_sharded, store_barrier
from swiftmoe_lightning.engine.checkpoint import full_state
from swiftmoe_lightning.ops import is_factor

_NAME: Final = "save_pretrained"
# Short, so that a user who saves on one rank only soon sees the error.
_TIMEOUT_S: Final = 60


def gather_before_save_pretrained(module: nn.Module) -> None:
    """Let `save_pretrained` of the classes in `module` gather experts first, for the rest of the process."""
    for child in module.modules():
        for kind in type(child).__mro__:
            save = vars(kind).get(_NAME)
            if save is not None and not hasattr(save, "_swiftmoe") and _takes_state(save):
                setattr(kind, _NAME, _with_gathered_experts(save))


def _takes_state(save: Any) -> bool:
    parameters = inspect.signature(save).parameters
    # PEFT's takes the state among other options.
    return "is_main_process" in parameters and not {"state_dict", "kwargs"}.isdisjoint(parameters)


def _saves_sharded(model: nn.Module, is_whole: bool) -> bool:
    """Whether some of what is saved is sharded.

    Args:
        model: is saved.
        is_whole: whether all of it is, and not an adapter alone, whose factors PEFT gathers on all ranks.
    """
    return any(is_sharded(p) and (is_whole or is_factor(name)) for name, p in model.named_parameters())


def _with_gathered_experts(save: Any) -> Any:
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        # transformers gathers a model itself that it has distributed.
        gathers = getattr(model, "is_distributed_loading_by_transformers", False)
        options = bound.arguments if "state_dict" in bound.arguments else bound.arguments["kwargs"]
        if options.get("state_dict") is None and not gathers and _saves_sharded(model, options is bound.arguments):
            store_barrier(_NAME, _TIMEOUT_S)
            writes = dist.get_rank() == 0
            bound.arguments["is_main_process"] &= writes
            if options is bound.arguments:
                options["state_dict"] = full_state(dict(model.state_dict()), keep=writes)
                if not writes:
                    return None
        return save(*bound.args, **bound.kwargs)

    save_pretrained._swiftmoe = True  # type: ignore[attr-defined]
    return save_pretrained
