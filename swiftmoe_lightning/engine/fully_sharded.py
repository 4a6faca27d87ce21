"""The dense part of a module, cut over the ranks by FSDP2 (`fully_shard`), on the mesh of the experts' parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from swiftmoe_lightning.distributed import ExpertGroup, is_sharded, shard_whole_values
from swiftmoe_lightning.engine.stale_parameters import StaleParameters


class FullyShardedDense:
    """Parameters, gradients and optimizer state of the dense part are cut over the ranks; weights are gathered for use.

    In training FSDP2 gathers a block's weights before its forward and its backward. Evaluation gathers all of them
    once, so that ranks may then have differently many batches, and drops them when training goes on.

    Args:
        module: cut in place, rank 0's values. Each child of an outermost `nn.ModuleList` is gathered by itself, the
            rest together. Cut already: taken as it is. A collective.
        group: on whose mesh it is cut.
        wire_dtype: dtype of gradients under way, float64 ones excepted.
        agree: a collective that raises on all ranks unless all have come to the same gather; given whether they train.

    Attributes:
        stale_parameters: those from before the cut.
    """

    def __init__(
        self, module: nn.Module, group: ExpertGroup, wire_dtype: torch.dtype, agree: Callable[[bool], None]
    ) -> None:
        self._root, self._whole, self._agree = module, False, agree
        self._syncs = True
        self.stale_parameters = StaleParameters()
        if not isinstance(module, FSDPModule):
            self._shard(module, group, wire_dtype)
        # The root first: it must be the first that FSDP2 sees run.
        self._sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
        module.register_forward_pre_hook(self._before_forward, prepend=True)

    def _shard(self, module: nn.Module, group: ExpertGroup, wire_dtype: torch.dtype) -> None:
        parameters = {p for p in module.parameters() if is_sharded(p)}
        dense = [p for p in module.parameters() if not is_sharded(p)]
        for tensor in [*dense, *module.buffers()]:
            dist.broadcast(tensor.detach(), group=group.process_group, group_src=0)
        self.stale_parameters.add(dense)
        doubles = any(p.dtype == torch.float64 for p in dense)
        policy = MixedPrecisionPolicy(reduce_dtype=None if doubles else wire_dtype)
        for part in [*dict.fromkeys(_blocks_of(module)), module]:
            fully_shard(part, mesh=group.mesh, mp_policy=policy, ignored_params=parameters)
        # Evaluation may gather before the first forward, which would do this.
        _state_of(module)._lazy_init()
        for part in module.modules():
            part.register_load_state_dict_pre_hook(_shard_loaded)

    @torch.compiler.disable
    def _before_forward(self, *_: object) -> None:
        self.begin_forward(not self._root.training and not torch.is_grad_enabled())

    def begin_forward(self, evaluates: bool) -> None:
        """Hold the weights as this forward needs them. A collective, but for evaluations after the first in a row.

        Args:
            evaluates: without gradients, and the weights may stay whole until training goes on.

        Raises:
            RuntimeError: when other ranks are elsewhere, on all: in FSDP2's gathers they would wait for ever.
        """
        if not (evaluates and self._whole):
            self._agree(not evaluates)
        self.gather(evaluates)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward adds gradients to those that wait (accumulation); outside it reduces them."""
        before, self._syncs = self._syncs, False
        self._root.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self._syncs = before
            self._root.set_requires_gradient_sync(before)  # type: ignore[operator]

    def gather(self, whole: bool) -> None:
        """Hold all weights whole from now on, or cut them again. A collective when it turns to whole."""
        if whole:
            # Weights that were first gathered in inference mode could not be trained.
            with torch.inference_mode(False), torch.no_grad():
                for part in self._sharded:
                    part.unshard()
        if whole == self._whole:
            return
        self._whole = whole
        if not whole:
            self._forget_forwards()
        for part in self._sharded:
            part.set_reshard_after_forward(not whole and part is not self._root, recurse=False)
            if not whole:
                part.reshard()

    def _forget_forwards(self) -> None:
        """FSDP2 prefetches in backward by the order of all forwards since the last one, evaluation's among them, of
        which ranks may have had differently many: they would then gather different blocks at once."""
        order = _state_of(self._root)._comm_ctx.post_forward_order
        for param_group in order:
            param_group._post_forward_indices.clear()
        order.clear()


def _state_of(module: nn.Module) -> Any:
    return fully_shard.state(module)  # type: ignore[attr-defined]


def _blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The children of the outermost ModuleLists: in a transformer, its layers. One in several places comes as often."""
    is_list = isinstance(module, nn.ModuleList)
    for child in module.children():
        if is_list and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield child
        else:
            yield from _blocks_of(child)


def _shard_loaded(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    shard_whole_values(dict(module.named_parameters(recurse=False)), state, prefix)
