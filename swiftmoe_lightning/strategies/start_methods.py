"""Ranks that `multiprocessing` starts from a running process (spawn, fork, forkserver), as notebooks need them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.strategies.launchers import _MultiProcessingLauncher as _FabricLauncher
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from swiftmoe_lightning.engine.checkpoint import full_state
from swiftmoe_lightning.engine.materialize import materialize_dense


class StartMethodMixin:
    """For strategies of Lightning: starts processes by any of its start methods."""

    multiprocessing_launcher: ClassVar[type]
    _start_method: Literal["popen", "spawn", "fork", "forkserver"]
    _launcher: Any

    def _configure_launcher(self) -> None:
        super()._configure_launcher()  # type: ignore[misc]
        if self._start_method != "popen":
            self._launcher = self.multiprocessing_launcher(self, start_method=self._start_method)
        if _IS_INTERACTIVE and not self._launcher.is_interactive_compatible:
            raise MisconfigurationException(
                f"{type(self).__name__}(start_method={self._start_method!r}) cannot start its processes from a "
                "notebook. Use strategy='swiftmoe_notebook', or start_method='fork'; or run a script."
            )


class TrainerLauncher(_MultiProcessingLauncher):
    """Lightning's, whose ranks gather the weights that go back to the process that called `trainer.fit`."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        return super().launch(partial(_call, function), *args, trainer=trainer, **kwargs)

    @override
    def _collect_rank_zero_results(self, trainer: Trainer, results: Any) -> Any:
        if trainer.state.fn == TrainerFn.FITTING:
            # Lightning takes the module's state dict on all ranks next, and keeps that of each node's first.
            keep = self._strategy.local_rank == 0
            trainer.lightning_module.register_state_dict_post_hook(partial(_gather, keep=keep))
        return super()._collect_rank_zero_results(trainer, results)

    @override
    def _recover_results_in_main_process(self, worker_output: Any, trainer: Trainer) -> None:
        if worker_output.weights_path is not None:
            # What only the ranks have made or allocated so far.
            trainer.lightning_module.configure_model()
            materialize_dense(trainer.lightning_module, torch.device("cpu"))
        super()._recover_results_in_main_process(worker_output, trainer)


class FabricLauncher(_FabricLauncher):
    """Fabric's. What a function returns cannot be tensors there, so weights come back by `fabric.save`."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return super().launch(partial(_call, function), *args, **kwargs)


def _gather(_: nn.Module, state: dict[str, Any], *__: Any, keep: bool) -> None:
    """Make a module's state dict whole, in place. A collective."""
    state.update(full_state(dict(state), keep))


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function on a rank, with modules of its own.

    Raises:
        RuntimeError: when it exits (at SIGTERM, or by `sys.exit`): the process that waits for its result would wait on.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, nn.Module):
            _unshare(value)
    try:
        return function(*args, **kwargs)
    except SystemExit as stop:
        raise RuntimeError(f"a rank was stopped by {type(stop).__name__}({stop}) before it had a result.") from stop


@torch.no_grad()
def _unshare(module: nn.Module) -> None:
    """Copy what lies in memory that all ranks share: pickling puts it there.

    Lightning (2.6) copies under spawn alone; not under forkserver, nor under fork once a spawn has shared the module.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.is_shared():
            tensor.data = tensor.data.clone()
