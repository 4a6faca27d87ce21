"""The wrappers that `engine.data_parallel()` returns: by DDP, and for a dense part that FSDP2 has cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swiftmoe_lightning.distributed import is_sharded

if TYPE_CHECKING:
    from swiftmoe_lightning.engine.engine import SwiftMoEEngine

# The beginning of torch's message about parameters that backward did not reach.
_UNFINISHED_REDUCTION: Final = "Expected to have finished reduction"


class ExpertDataParallel(DistributedDataParallel):
    """DDP that leaves experts and router biases to the engine, and whose `no_sync()` also pauses collection.

    Args:
        module: the dense part is averaged over the ranks.
        engine: of the module's experts.
        **ddp_options: anything `DistributedDataParallel` takes.
    """

    def __init__(self, module: nn.Module, engine: SwiftMoEEngine, **ddp_options: Any) -> None:
        ignore_expert_parameters(module)
        super().__init__(module, **ddp_options)
        self.engine: SwiftMoEEngine | None = engine

    def __getstate__(self) -> dict[str, Any]:
        # A copy (AveragedModel) has no engine until it is given a new one.
        return {**super().__getstate__(), "engine": None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """DDP's forward.

        Raises:
            ValueError: inside torch's `Join`, where ranks have uneven inputs.
            RuntimeError: when the backward before it did not reach every dense parameter.
        """
        if self._join_config.enable and self.engine is not None and self.engine.layers:
            raise ValueError(
                "ranks with spread experts need equally many training batches, and cannot join uneven inputs. Leave "
                "Join out, and set drop_last=True in the loader, or with Accelerate even_batches=True. "
                "(FAQ: uneven-batches)"
            )
        try:
            return super().forward(*args, **kwargs)
        except RuntimeError as error:
            if _UNFINISHED_REDUCTION not in str(error):
                raise
            raise RuntimeError(
                "the backward before this forward did not reach every dense parameter. If an exception ended it, "
                "DistributedDataParallel cannot go on: wrap the module again (model = engine.data_parallel()) and call "
                "zero_grad() before you try again. If parameters were not used, pass find_unused_parameters=True. "
                f"DistributedDataParallel says: {error} (FAQ: failed-backward)"
            ) from error

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward neither averages dense gradients nor collects those of experts."""
        with super().no_sync(), nullcontext() if self.engine is None else self.engine.no_sync():
            yield


class ShardedDataParallel(DistributedDataParallel):
    """A module whose dense part FSDP2 has cut over the ranks, in a wrapper that frameworks recognise.

    Accelerate, transformers and Fabric recognise a wrapped module by the type DistributedDataParallel, take the user's
    module from `module`, and accumulate in `no_sync()`. DDP itself is not used: FSDP2's hooks on the module average the
    dense gradients.

    Args:
        module: its dense part is cut already.
        engine: of the module's experts.
    """

    def __init__(self, module: nn.Module, engine: SwiftMoEEngine) -> None:
        nn.Module.__init__(self)
        self.module, self.engine = module, engine

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward neither reduces dense gradients nor collects those of experts."""
        with self.engine.no_sync():
            yield


def ignore_expert_parameters(module: nn.Module) -> None:
    """Let DDP, and Lightning's own broadcast, ignore experts, and routers' biases and tables.

    All ranks compute equal ones of the latter. A broadcast of them in every forward would need equally many evaluation
    batches on all ranks.
    """
    names = [name for name, p in module.named_parameters() if is_sharded(p)]
    names += [name for name, _ in module.named_buffers() if name.endswith(("expert_bias", "expert_ids_VK"))]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
