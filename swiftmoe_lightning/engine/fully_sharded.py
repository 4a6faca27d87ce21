"""Cuts the dense part of a module over the ranks by FSDP2 (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from swiftmoe_lightning.distributed import (
    ExpertGroup,
    is_cut_over,
    is_on,
    is_sharded,
    local_shard,
    shard_whole_values,
)
from swiftmoe_lightning.engine.stale_parameters import StaleParameters


class FullyShardedDense:
    """The dense part with parameters, gradients and optimizer state cut over the ranks; weights are gathered for use.

    In training FSDP2 gathers a block's weights before its forward and its backward. Evaluation gathers all of them
    once, so that ranks may then have different numbers of batches, and frees them when training goes on.

    Construction is a collective: rank 0's values are cut, in place. A module that FSDP2 has cut already stays as it is.

    Args:
        module: each child of an outermost `nn.ModuleList` is gathered by itself, the rest together.
        group: its ranks have the module.
        is_hybrid: cut over each expert group; the groups have copies.
        wire_dtype: dtype in which gradients are sent, except float64 ones.
        agree: a collective that raises on all ranks unless all are about to gather; takes whether this rank trains.

    Attributes:
        stale_parameters: the parameters that the cut replaced.
    """

    def __init__(
        self,
        module: nn.Module,
        group: ExpertGroup,
        is_hybrid: bool,
        wire_dtype: torch.dtype,
        agree: Callable[[bool], None],
    ) -> None:
        self._root, self._is_unsharded, self._agree = module, False, agree
        self._syncs = True
        self.stale_parameters = StaleParameters()
        if not isinstance(module, FSDPModule):
            self._shard(module, group, is_hybrid, wire_dtype)
        # The root first: FSDP2 must see it run before the others.
        self._sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
        module.register_forward_pre_hook(self._before_forward, prepend=True)

    def _shard(self, module: nn.Module, group: ExpertGroup, is_hybrid: bool, wire_dtype: torch.dtype) -> None:
        expert_parameters = {p for p in module.parameters() if is_cut_over(p, group)}
        dense = [p for p in module.parameters() if p not in expert_parameters]
        mesh = group.dense_mesh(is_hybrid)
        for tensor in [*dense, *module.buffers()]:
            if not is_sharded(tensor):
                group.broadcast(tensor.detach())
            elif not is_on(tensor, mesh):
                # Tensor-parallel: the values of the first rank on the other axes.
                for axis in range(mesh.ndim):
                    dist.broadcast(local_shard(tensor), group=mesh.get_group(axis), group_src=0)
        has_float64 = any(p.dtype == torch.float64 for p in dense)
        policy = MixedPrecisionPolicy(reduce_dtype=None if has_float64 else wire_dtype)
        for part in [*dict.fromkeys(_blocks_of(module)), module]:
            # The user may have cut some of the blocks.
            if not isinstance(part, FSDPModule):
                fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=expert_parameters)
        self.stale_parameters.add(set(dense).difference(module.parameters()))
        # FSDP2 does this in the first forward, but evaluation may gather before it.
        _state_of(module)._lazy_init()
        for part in module.modules():
            part.register_load_state_dict_pre_hook(_shard_loaded)

    @torch.compiler.disable
    def _before_forward(self, *_: object) -> None:
        self.begin_forward(not self._root.training and not torch.is_grad_enabled())

    def begin_forward(self, evaluates: bool) -> None:
        """Gather or cut the weights, as this forward needs them.

        A collective, except in evaluation while the weights are gathered.

        Args:
            evaluates: the forward has no gradients, and the weights may stay gathered until training goes on.

        Raises:
            RuntimeError: on all ranks, when others are not in the same call. FSDP2's gathers would wait for ever.
        """
        if not (evaluates and self._is_unsharded):
            self._agree(not evaluates)
        if evaluates:
            self.unshard()
        else:
            self.reshard()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward accumulates gradients without reducing them; the first backward outside reduces them."""
        previous, self._syncs = self._syncs, False
        self._root.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self._syncs = previous
            self._root.set_requires_gradient_sync(previous)  # type: ignore[operator]

    def unshard(self) -> None:
        """Gather all weights, and keep them until `reshard`. A collective, unless they are gathered."""
        # Weights that were first gathered in inference mode could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            for part in self._sharded:
                part.unshard()
        if not self._is_unsharded:
            self._is_unsharded = True
            for part in self._sharded:
                part.set_reshard_after_forward(False, recurse=False)

    def reshard(self) -> None:
        """Cut the weights again, if `unshard` has gathered them. No communication."""
        if not self._is_unsharded:
            return
        self._is_unsharded = False
        self._forget_forward_order()
        for part in self._sharded:
            part.set_reshard_after_forward(part is not self._root, recurse=False)
            part.reshard()

    def _forget_forward_order(self) -> None:
        """Clear the order of forwards by which FSDP2 prefetches in the next backward.

        It includes evaluation's forwards. Ranks may have had different numbers of those, and would then gather
        different blocks at the same time.
        """
        order = _state_of(self._root)._comm_ctx.post_forward_order
        for param_group in order:
            param_group._post_forward_indices.clear()
        order.clear()


def reshard_all(module: nn.Module) -> None:
    """Cut all weights in `module` again that FSDP2 has gathered, whoever cut them first. No communication."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _state_of(module: nn.Module) -> Any:
    return fully_shard.state(module)  # type: ignore[attr-defined]


def _blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The children of the outermost ModuleLists: a transformer's layers. A shared child is repeated."""
    is_list = isinstance(module, nn.ModuleList)
    for child in module.children():
        if is_list and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield child
        else:
            yield from _blocks_of(child)


def _shard_loaded(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    shard_whole_values(dict(module.named_parameters(recurse=False)), state, prefix)
