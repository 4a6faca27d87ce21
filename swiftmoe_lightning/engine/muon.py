"""Muon for experts and dense matrices, whole or cut by rows over ranks, with AdamW for the rest.

E experts, n matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.utils.weak import WeakIdKeyDictionary

from swiftmoe_lightning.config import check_choice
from swiftmoe_lightning.distributed import (
    CutMatrices,
    RankGroup,
    apply_to_whole,
    local_shard,
    phase,
    refuse_different_matrices,
)
from swiftmoe_lightning.engine.gradient_placeholder import has_gradient
from swiftmoe_lightning.engine.muon_matrices import RowCut, gradient_of, matrices_of
from swiftmoe_lightning.ops import orthogonalize
from swiftmoe_lightning.placement import LAYOUTS

# Those of torch.optim.AdamW, for groups with use_muon=False.
_ADAMW: Final = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
_ADJUSTMENTS: Final = ("original", "match_rms_adamw")


@dataclass
class _Found:
    """Matrices that are cut over the same ranks, the group of each, and where they are orthogonalised."""

    device: torch.device
    matrices: list[CutMatrices] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)


class Muon(Optimizer):
    """`torch.optim.Muon` that also takes experts, and in groups with `use_muon=False` AdamW: one optimizer for a model.

    Each expert's gate, up and down is a matrix of its own. Parameters that are cut by rows over ranks (experts under an
    engine, dense ones under FSDP2) keep their momentum cut. In a step its rows go to the rank that orthogonalises the
    matrix, and the result comes back, both in bfloat16, in which it is computed anyway: N elements of matrices on W
    ranks make 4 N (W - 1) / W**2 bytes that a rank sends. What is not cut is computed on every rank.

    Group keys besides the arguments below: `use_muon` (True); for Muon's 3-D parameters `experts`, how a tensor's
    matrices lie: "matrix" (one), "halves" or "interleaved" (gate and up), and `transposed` (False; True for
    [E, in, out]); for AdamW's groups `betas`, and `torch.optim.AdamW`'s defaults. `muon_groups` makes the groups.

    Args:
        params: parameters, or groups of them: 2-D, and 3-D in groups that have `experts`.
        lr: learning rate.
        weight_decay: decoupled, times `lr`.
        momentum: of the gradients' moving average.
        nesterov: orthogonalise the average after the next step, not this one.
        ns_coefficients: of the Newton-Schulz iteration.
        eps: the least norm by which a matrix is divided before it.
        ns_steps: how many iterations.
        adjust_lr_fn: None or "original" multiplies `lr` by sqrt(max(1, out / in)), "match_rms_adamw" by
            0.2 sqrt(max(out, in)).

    Raises:
        ValueError: for a setting out of range, or parameters that are not what their group says.
    """

    compute_device: torch.device | None = None
    bytes_sent = 0
    check_group: Callable[[dict[str, Any]], None] | None = None
    _cuts: WeakIdKeyDictionary | None = None

    def __init__(  # noqa: PLR0913 - public options
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        if adjust_lr_fn is not None:
            check_choice("adjust_lr_fn", adjust_lr_fn, _ADJUSTMENTS)
        for name, value in {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}.items():
            if not float(value) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}.")
        if len(ns_coefficients) != 3:
            raise ValueError(f"ns_coefficients must be three numbers, got {ns_coefficients!r}.")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "use_muon": True,
            "experts": None,
            "transposed": False,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: for parameters that are not what the group says.
        """
        if not param_group.get("use_muon", True):
            param_group = {**_ADAMW, **param_group}
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            _check_shapes(added)
            if self.check_group is not None:
                self.check_group(added)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients. A collective of the ranks over which some are cut.

        Args:
            closure: computes the loss anew, which is returned.

        Raises:
            RuntimeError: on all ranks, when they have gradients of different parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found: dict[dist.ProcessGroup | None, _Found] = {}
        for group in self.param_groups:
            if group["use_muon"]:
                self._find(group, found)
            else:
                self._update_by_adamw(group)
        with phase("orthogonalize"):
            for process_group, matrices in found.items():
                self._orthogonalize(matrices, process_group)
        return loss

    def _find(self, group: dict[str, Any], found: dict[dist.ProcessGroup | None, _Found]) -> None:
        """Add the group's matrices to those that are cut over the same ranks."""
        for parameter in group["params"]:
            cut = self._cut_of(parameter)
            device = self.compute_device or local_shard(parameter).device
            # Also without a gradient: ranks that have one meet the others.
            alike = found.setdefault(cut.process_group, _Found(device))
            if has_gradient(parameter):
                matrices = matrices_of(parameter, self._average(group, parameter), group, cut, alike.device)
                alike.matrices += matrices
                alike.settings += [group] * len(matrices)

    def _cut_of(self, parameter: Tensor) -> RowCut:
        # Not in the constructor: a copy of an optimizer has only its groups and state.
        if self._cuts is None:
            self._cuts = WeakIdKeyDictionary()
        if parameter not in self._cuts:
            self._cuts[parameter] = RowCut.of(parameter)
        cut: RowCut = self._cuts[parameter]
        return cut

    def _average(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """The moving average of the parameter's gradients, with the present one."""
        gradient, state = gradient_of(parameter), self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average: Tensor = state["momentum_buffer"]
        return average.lerp_(gradient, 1 - group["momentum"])

    def _orthogonalize(self, found: _Found, process_group: dist.ProcessGroup | None) -> None:
        ranks = None if process_group is None else RankGroup(process_group)
        if ranks is not None:
            refuse_different_matrices([cut.stack for cut in found.matrices], ranks, found.device)

        def function(stack: int, whole: Tensor) -> Tensor:
            group = found.settings[stack]
            return orthogonalize(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])

        self.bytes_sent += apply_to_whole(found.matrices, function, ranks)

    def _update_by_adamw(self, group: dict[str, Any]) -> None:
        """`torch.optim.AdamW` on what this rank has of each parameter."""
        parameters = [p for p in group["params"] if has_gradient(p)]
        gradients = [gradient_of(p) for p in parameters]
        states = [self.state[p] for p in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        adamw(
            [local_shard(p) for p in parameters],
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def _check_shapes(group: dict[str, Any]) -> None:
    """Raise ValueError for a group of Muon's whose parameters are no matrices, or not cut by rows."""
    if not group["use_muon"]:
        return
    if group["experts"] is not None:
        check_choice("experts", group["experts"], LAYOUTS)
    num_dims = 2 if group["experts"] is None else 3
    for parameter in group["params"]:
        if parameter.dim() != num_dims:
            raise ValueError(
                f"a group of Muon's with experts={group['experts']!r} has {num_dims}-D parameters, got one of shape "
                f"{list(parameter.shape)}. Make the groups by sml.muon_groups(model), which knows how experts' "
                "matrices lie, and leaves vectors to AdamW (use_muon=False). (FAQ: muon-on-experts)"
            )
        if group["transposed"] and num_dims == 2:
            raise ValueError("transposed is for experts: a 2-D parameter is [out, in]. Leave it False.")
        RowCut.of(parameter)
