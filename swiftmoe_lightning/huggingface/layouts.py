"""Fused experts of Hugging Face transformers: what a module computes, by its structure and by a trial on few tokens.

Nothing depends on a model's name. R rows, E experts, K top-k, T tokens, D model dim, F hidden dim.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from swiftmoe_lightning.modules.experts import Experts
from swiftmoe_lightning.ops import ACTIVATIONS, Activation, activate, all_finite, backend

_UP: Final = ("gate_up_proj", "up_proj")
_SMALL_F: Final = 4
_NUM_TOKENS: Final = 6


class RepeatedExperts(Experts):
    """Experts that get every token once for each expert, already scaled by the router, as in Llama 4.

    An assignment that the router did not make is a row of zeros, whose output is zero, too. Such rows are not
    dispatched.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[E * T, D], expert by expert -> [E * T, D].

        Args:
            hidden_states: each token's row E times, times the weight of the expert, or zero where it is not chosen.

        Raises:
            FloatingPointError: for non-finite rows.
        """
        expert_R = torch.arange(self.num_experts, device=hidden_states.device)
        expert_R = expert_R.repeat_interleave(len(hidden_states) // self.num_experts)
        chosen_R = hidden_states.detach().ne(0).any(-1)
        ids_R1 = torch.where(chosen_R, expert_R, self.num_experts).unsqueeze(1)
        weights_R1 = torch.ones_like(ids_R1, dtype=torch.float32)
        return self.run(hidden_states, ids_R1, weights_R1, all_finite(hidden_states)).hidden_TD


def as_experts(module: nn.Module) -> Experts:
    """An `Experts` with the parameters of `module`, that computes the same and is called in the same way.

    Args:
        module: an experts module of the fused layout; it is left as it is.

    Raises:
        ValueError: with the reason when there is no such `Experts`.
    """
    parameters = _fused_parameters(module)
    # The eager forward, without the decorator that picks another implementation (grouped_mm, kernels).
    forward = inspect.unwrap(type(module).forward)
    kind = Experts if _takes(forward, 3) else RepeatedExperts
    if not _takes(forward, 3) and not _takes(forward, 1):
        arguments = list(inspect.signature(forward).parameters)[1:]
        raise ValueError(f"its forward takes {arguments}, not hidden states, expert ids and their weights")
    activation = _activation_of(module, gated="gate_up_proj" in parameters)
    reason = f"the shapes of its tensors do not fit together: { {n: list(p.shape) for n, p in parameters.items()} }"
    for transposed in (False, True):
        experts = kind.from_parameters(parameters, activation, transposed)
        shapes = _shapes(parameters, experts.num_experts, experts.dim, experts.hidden_dim, transposed)
        if {name: p.shape for name, p in parameters.items()} == shapes:
            difference = _difference(module, forward, experts)
            if difference is None:
                experts.is_transposed = getattr(module, "is_transposed", False)
                return experts.train(module.training)
            reason = f"it computes something else than act(x @ up) @ down, weighted and summed: {difference}"
    raise ValueError(reason)


def _fused_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of a module that has those of the fused layout and nothing else. Raises ValueError."""
    if "base_layer" in module._modules or "parametrizations" in module._modules:
        raise ValueError("its weights are wrapped (not by PEFT's LoRA): merge or unload the adapter before convert()")
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weights = [own[name] for name in ("down_proj", *_UP) if name in own]
    if "down_proj" not in own or len(weights) != 2 or any(w.dim() != 3 for w in weights):
        raise ValueError("it has no 3-D tensors gate_up_proj (or up_proj) and down_proj, fused over experts as in v5")
    for name, p in own.items():
        if not p.is_floating_point() or p.element_size() == 1:
            raise ValueError(f"{name} is quantized ({p.dtype}): load the model without a quantization_config")
        if type(p) is not nn.Parameter:
            raise ValueError(f"{name} is a {type(p).__name__}: convert() before the tensors are sharded or quantized")
    tensors = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    up = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    other_tensors = sorted(tensors - {up, f"{up}_bias", "down_proj", "down_proj_bias"})
    if other_tensors:
        raise ValueError(f"it holds tensors besides those of the fused layout: {other_tensors}")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in vars(module) or any(hooks):
        raise ValueError("its forward is replaced or has hooks (offloading, expert parallelism): convert() before that")
    return own


def _takes(forward: Callable[..., Tensor], num_arguments: int) -> bool:
    """Whether a method can be called with so many arguments."""
    try:
        inspect.signature(forward).bind(*range(1 + num_arguments))
    except TypeError:
        return False
    return True


def _shapes(names: Iterable[str], num_experts: int, dim: int, hidden_dim: int, transposed: bool) -> dict[str, Any]:
    """Name -> shape of these tensors of the fused layout."""

    def weight(rows: int, columns: int) -> tuple[int, ...]:
        return (num_experts, columns, rows) if transposed else (num_experts, rows, columns)

    shapes = {
        "gate_up_proj": weight(2 * hidden_dim, dim),
        "gate_up_proj_bias": (num_experts, 2 * hidden_dim),
        "up_proj": weight(hidden_dim, dim),
        "up_proj_bias": (num_experts, hidden_dim),
        "down_proj": weight(dim, hidden_dim),
        "down_proj_bias": (num_experts, dim),
    }
    return {name: shapes[name] for name in names}


def _activation_of(module: nn.Module, gated: bool) -> Activation:
    """The activation between the two matmuls: our kernels' name of it where the two agree to the bit in float32, else
    the module's own function. (In bfloat16 our kernels round once, not after each operation.)

    Raises ValueError when the module does not say.
    """
    apply_gate, act_fn = getattr(module, "_apply_gate", None), getattr(module, "act_fn", None)
    function: Callable[[Tensor], Tensor]
    if gated and callable(apply_gate):
        function = _with_parameters(module, {})._apply_gate
    elif callable(act_fn):
        function = functools.partial(_gate, act_fn) if gated else act_fn
    else:
        raise ValueError("it has no act_fn or _apply_gate that says what its activation is")
    return _named(function, gated) or function


@torch.no_grad()
def _named(function: Callable[[Tensor], Tensor], gated: bool) -> str | None:
    """Our kernels' name of `function` where the two agree to the bit in float32, else None."""
    # Large values as well, on which alone a clamp can be seen.
    z_R = torch.linspace(-20, 20, 64, device="cpu", dtype=torch.float32)
    z_RF = z_R.outer(torch.tensor([1.0, 30.0, 1e5], device="cpu", dtype=torch.float32)).flatten().roll(7).view(2, -1)
    with backend.force_backend("torch"):
        ours = {name: activate(z_RF, name) for name in ACTIVATIONS if gated == (name == "swiglu")}
    expected = function(z_RF)
    return next((name for name, value in ours.items() if torch.equal(value, expected)), None)


def _gate(act_fn: Callable[[Tensor], Tensor], z_R: Tensor) -> Tensor:
    gate_RF, up_RF = z_R.chunk(2, dim=-1)
    return act_fn(gate_RF) * up_RF


def _with_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Any:
    """A shallow copy of `module` with other parameters, so that it does not keep the old ones alive."""
    other = copy.copy(module)
    other._parameters = dict(parameters)
    return other


@torch.no_grad()
def _difference(module: nn.Module, forward: Callable[..., Tensor], experts: Experts) -> str | None:
    """How the outputs of both differ on a few random tokens with random weights; None if they do not.

    E and D are the module's own. It runs on the CPU, wherever the module is.
    """
    generator = torch.Generator().manual_seed(0)
    num_experts, dim = experts.num_experts, experts.dim
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        shapes = _shapes(experts.expert_parameters(), num_experts, dim, _SMALL_F, experts.transposed)
        # A scale at which activations are large enough for clamps to act.
        scales = {name: 8 / dim**0.5 if name in _UP else 1.0 for name in shapes}
        small = {name: nn.Parameter(_draw(shape, generator) * scales[name]) for name, shape in shapes.items()}
        ours = experts.from_parameters(small, experts.activation, experts.transposed)
        x_TD = torch.randn(_NUM_TOKENS, dim, generator=generator, dtype=torch.float32)
        ids_TK = torch.rand(_NUM_TOKENS, num_experts, generator=generator).topk(min(2, num_experts)).indices
        inputs = [x_TD, ids_TK, torch.rand(ids_TK.shape, generator=generator, dtype=torch.float32)]
        if isinstance(experts, RepeatedExperts):
            chosen_ET = torch.zeros(_NUM_TOKENS, num_experts).scatter(1, ids_TK, 1.0).T
            inputs = [(chosen_ET.unsqueeze(-1) * x_TD).flatten(0, 1)]
        try:
            expected, computed = forward(_with_parameters(module, small), *inputs), ours(*inputs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if not isinstance(expected, Tensor) or expected.shape != computed.shape:
            return f"its outputs are {getattr(expected, 'shape', type(expected))}, not {list(computed.shape)}"
        relative = float((computed - expected).abs().max() / expected.abs().max())
    return None if relative < 1e-3 else f"its outputs differ by {relative:.0%}"


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random tensor [E, ...] whose experts all differ, in little more memory than one of them takes."""
    numel, step = torch.Size(shape[1:]).numel(), 16
    strides = torch.empty(shape[1:], device="meta").stride()
    flat = torch.randn(numel + step * shape[0], generator=generator, dtype=torch.float32)
    return flat.as_strided(shape, (step, *strides))
