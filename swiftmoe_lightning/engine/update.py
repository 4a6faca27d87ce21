"""Lets an optimizer update plain local shards, and save and load its state as whole experts.

Stock optimizers are slow or fail on lists that mix Tensor and DTensor (foreach, fused, the for-loop fallback). So
while `optimizer.step()` updates, its groups have this rank's shards; before and after, the sharded parameters.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swiftmoe_lightning.distributed import gradient_shard, is_sharded, local_shard, shard_of, sharded_like
from swiftmoe_lightning.engine.gradient_placeholder import has_gradient
from swiftmoe_lightning.engine.muon import Muon

_ELEMENTWISE: Final = (
    "Use an elementwise optimizer (SGD, Adam, AdamW, RMSprop, Adagrad, ...) for parameters cut over the ranks, or "
    "sml.Muon; others may keep the dense ones, in an optimizer of their own, with dense='ddp'."
)
# Part of an optimizer's name -> what it needs of a whole tensor.
_REASONS: Final = {
    "muon": "it orthogonalises matrices",
    "adafactor": "sums of its rows and columns",
    "shampoo": "products of a matrix with its transpose",
    "soap": "products of a matrix with its transpose",
    "lbfgs": "products of all gradients with each other",
    "lamb": "its norm",
    "lars": "its norm",
}


class ShardedUpdate:
    """Hooks on one optimizer that swap sharded parameters for shards around the update and at its checkpoints.

    Args:
        optimizer: to hook.
        name_of: parameter -> its name, for messages.
        after_step: called after every real or skipped `optimizer.step()`.

    Raises:
        ValueError: when the optimizer's update is neither elementwise nor that of `Muon`, or cannot run on shards.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        name_of: Callable[[nn.Parameter], str],
        after_step: Callable[[], None],
    ) -> None:
        self.optimizer, self._name_of, self._after_step = optimizer, name_of, after_step
        self._swapped: list[tuple[dict[str, Any], int, nn.Parameter]] = []
        self._num_groups = 0
        self._prepare_new_groups()
        optimizer.register_step_pre_hook(self._before_update)
        optimizer.register_step_post_hook(self._after_update)
        optimizer.register_state_dict_pre_hook(lambda _: self._swap_out_shards())
        optimizer.register_state_dict_post_hook(self._wrap_state)
        optimizer.register_load_state_dict_pre_hook(self._shard_state)

    def _prepare_new_groups(self) -> None:
        """Check the groups that were added since the last call, and shard their state. (Unfreezing adds groups.)"""
        optimizer = self.optimizer
        added, self._num_groups = optimizer.param_groups[self._num_groups :], len(optimizer.param_groups)
        for param_group in added:
            parameters = [p for p in param_group["params"] if is_sharded(p)]
            if parameters and not isinstance(optimizer, Muon):
                check_elementwise(optimizer, param_group, parameters[0])
            for sharded in parameters:
                # Adagrad and others allocate state in their constructor, of the shape of whole experts.
                state = optimizer.state.get(sharded, {})
                state.update({key: self._shard_value(sharded, key, v) for key, v in state.items()})

    @property
    def bytes_sent(self) -> int:
        """To other ranks, by the update itself, since the start."""
        return self.optimizer.bytes_sent if isinstance(self.optimizer, Muon) else 0

    @contextmanager
    def on_shards(self) -> Iterator[None]:
        """Inside, the optimizer's groups have shards, with gradients and state; outside, sharded parameters."""
        self._swap_in_shards()
        try:
            yield
        finally:
            self._swap_out_shards()

    def _before_update(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Swap after the closure, not before: forward, backward and clipping inside it need the sharded parameters."""
        self._prepare_new_groups()
        self._swap_out_shards()
        if isinstance(self.optimizer, Muon):
            # It has to know how its parameters are cut.
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._swap_in_shards()
            return None

        def closure_then_swap() -> Any:
            self._swap_out_shards()
            loss = closure()
            self._swap_in_shards()
            return loss

        return args[:1], {**kwargs, "closure": closure_then_swap}

    def _after_update(self, *_: Any) -> None:
        self._swap_out_shards()
        self._after_step()

    @torch.no_grad()
    def _swap_in_shards(self) -> None:
        state = self.optimizer.state
        for param_group in self.optimizer.param_groups:
            for i, sharded in enumerate(param_group["params"]):
                if not is_sharded(sharded):
                    continue
                shard = nn.Parameter(local_shard(sharded), requires_grad=sharded.requires_grad)
                if has_gradient(sharded):
                    shard.grad = gradient_shard(sharded)
                param_group["params"][i] = shard
                self._swapped.append((param_group, i, sharded))
                if sharded in state:
                    state[shard] = state.pop(sharded)

    def _swap_out_shards(self) -> None:
        state = self.optimizer.state
        for param_group, i, sharded in self._swapped:
            shard = param_group["params"][i]
            param_group["params"][i] = sharded
            if shard in state:
                state[sharded] = state.pop(shard)
        self._swapped.clear()

    def _parameters(self) -> list[nn.Parameter]:
        """Every parameter, at the index that `state_dict` gives it."""
        return [p for param_group in self.optimizer.param_groups for p in param_group["params"]]

    def _wrap_state(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Local state -> DTensors, cut as the sharded parameters, so that savers see whole experts."""
        parameters = self._parameters()
        state = {}
        for index, values in state_dict["state"].items():
            sharded = parameters[index]
            state[index] = values
            if is_sharded(sharded):
                local = local_shard(sharded).shape
                state[index] = {
                    key: sharded_like(v, sharded)
                    if isinstance(v, Tensor) and v.shape == local and not is_sharded(v)
                    else v
                    for key, v in values.items()
                }
        return {**state_dict, "state": state}

    def _shard_state(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """State of whole experts, or DTensors, or local shards -> local shards.

        Matched by position in the groups, as in torch: keys may be numbers or names.
        """
        saved_keys = [key for param_group in state_dict["param_groups"] for key in param_group["params"]]
        parameters = {key: p for key, p in zip(saved_keys, self._parameters(), strict=False) if is_sharded(p)}
        state = {
            key: {k: self._shard_value(parameters[key], k, v) for k, v in values.items()}
            if key in parameters
            else values
            for key, values in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def _shard_value(self, sharded: nn.Parameter, key: str, value: Any) -> Any:
        value = local_shard(value) if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape == sharded.shape:
            return shard_of(value, sharded).clone()
        if value.shape != local_shard(sharded).shape:
            raise ValueError(
                f"optimizer state {key!r} of {self._name_of(sharded)!r} has shape {list(value.shape)} in the "
                f"checkpoint, and the parameter has {list(sharded.shape)}: it belongs to another model. Build the "
                "model with the checkpoint's num_experts, dim and hidden_dim. (FAQ: another-model)"
            )
        return value


def check_elementwise(optimizer: Optimizer, param_group: dict[str, Any], sharded: nn.Parameter) -> None:
    """Refuse an optimizer unless updating a tensor in two pieces gives the same result as updating it whole.

    An optimizer of this class and settings runs two steps on a small tensor and on its pieces, on the device and in the
    dtype of `sharded`'s shard. So unknown optimizers are checked, too.

    Args:
        optimizer: not changed.
        param_group: the group with the settings.
        sharded: a parameter of the group.

    Raises:
        ValueError: when the two differ, or the optimizer cannot update shards as it is set up.
    """
    name = type(optimizer).__name__
    fix = _ELEMENTWISE
    if "muon" in name.lower():
        fix = "sml.Muon(sml.muon_groups(model)) updates experts and dense matrices that are cut, and the rest by AdamW."
    shard = local_shard(sharded)
    start = torch.linspace(-1, 1, 24, dtype=shard.dtype, device=shard.device).view(2, 3, 4)
    try:
        updated, *updated_pieces = (
            _try_steps(optimizer, param_group, sharded, tensor) for tensor in (start, start[:, :1], start[:, 1:])
        )
    except Exception as error:
        raise ValueError(
            f"{name} cannot update shards as it is set up ({type(error).__name__}: {error}). {fix} If it is "
            "the fused or foreach flag that fails on this device or dtype, leave it unset. "
            "(FAQ: elementwise-optimizers)"
        ) from error
    if not torch.allclose(updated, torch.cat(updated_pieces, dim=1), rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{name} looks at whole tensors ({_looks_at(name)}), and each rank holds only a shard of each: its update "
            f"would be wrong. {fix} (FAQ: elementwise-optimizers)"
        )


def _looks_at(name: str) -> str:
    """What an optimizer of this class name needs of a whole tensor."""
    reasons = (reason for part, reason in _REASONS.items() if part in name.lower())
    return next(reasons, "norms, factors or orthogonalisation")


def _try_steps(optimizer: Optimizer, param_group: dict[str, Any], sharded: nn.Parameter, start: Tensor) -> Tensor:
    """A copy of `start` after two steps of an optimizer like this one, with state as `sharded` has."""
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    parameter = nn.Parameter(start.detach().clone())
    settings = {key: value for key, value in param_group.items() if key != "params"}
    if settings.get("lr") is not None:
        # A warm-up may start at a learning rate of zero, at which nothing would change.
        settings["lr"] = 0.1
    # Some allocate state in their constructor, which does not run here, and need it in step(): Adagrad of torch 2.11.
    shapes = (sharded.shape, local_shard(sharded).shape)
    state_of_parameter = {
        key: torch.ones_like(parameter) if isinstance(value, Tensor) and value.shape in shapes else copy.deepcopy(value)
        for key, value in optimizer.state.get(sharded, {}).items()
    }
    trial.__dict__.update(
        param_groups=[{**settings, "params": [parameter]}],
        state=defaultdict(dict, {parameter: state_of_parameter} if state_of_parameter else {}),
        _optimizer_step_pre_hooks=OrderedDict(),
        _optimizer_step_post_hooks=OrderedDict(),
    )
    for power in (2, 3):
        parameter.grad = start**power + start.sign()
        # The class's step, since a learning-rate scheduler wraps the instance's, which is bound to the real optimizer.
        type(optimizer).step(trial)
    return parameter.detach().to(torch.float64)
