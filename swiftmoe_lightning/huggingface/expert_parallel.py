"""`ep_implementation="swiftmoe"`: the engine as the expert parallelism of transformers' own `DistributedConfig`.

transformers reads the checkpoint, cuts and averages the dense part by FSDP2, runs the model, clips, and makes the
optimizer. The engine owns the experts: their rows, slots, gradients, and where they are in the next step.

In `from_pretrained` things happen in this order, on every rank:
1. the model is built on meta, and each experts module gets one `SwiftMoEExpertParallel`. Its parameters become buffers,
   because FSDP2 takes parameters only, cut by experts, because transformers reads experts one by one;
2. FSDP2 cuts the rest. It also marks the experts modules, in which it finds nothing;
3. the checkpoint is read: transformers assigns parameters in place of the buffers;
4. `model.eval()` ends it. Now the parameters become the engine's: cut by rows. So an optimizer has the right ones.

It imports transformers, so the package imports it on first use. E experts, g ranks of an expert group, T tokens, D
model dim, K top-k.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.distributed import expert_parallel, parallel_utils

from swiftmoe_lightning.config import SwiftMoEConfig, check_config
from swiftmoe_lightning.distributed import RankGroup, cut_by_experts, cut_by_rows
from swiftmoe_lightning.engine import SwiftMoEEngine
from swiftmoe_lightning.huggingface.experts import NAME
from swiftmoe_lightning.huggingface.layouts import as_experts
from swiftmoe_lightning.private_names import check_names

check_names(
    "transformers",
    {
        expert_parallel: ["EPImplementation", "EPImplementationInterface", "MoEParamShard"],
        parallel_utils: ["ALL_PARALLEL_STYLES"],
    },
    "transformers>=5.24,<6",
)

# The name by which plans cut expert parameters.
_PARAM_STYLE: Final = "grouped_gemm"


def register_expert_parallel(config: SwiftMoEConfig | None) -> None:
    """Make `ep_implementation="swiftmoe"` known to transformers. Repeatable.

    Args:
        config: of models that are loaded from now on.

    Raises:
        ValueError: for settings that are transformers' own here.
    """
    config = check_config(config)
    if config.dense != "ddp" or config.expert_parallel_size is not None:
        raise ValueError(
            f"dense={config.dense!r} and expert_parallel_size={config.expert_parallel_size} are fsdp_size (and "
            "dp_replicate_size) and ep_size of transformers' DistributedConfig. Set them there, and leave them out "
            "here."
        )
    expert_parallel.EPImplementationInterface.register(NAME, ExpertParallelism(config))
    styles = parallel_utils.ALL_PARALLEL_STYLES
    style = styles[_PARAM_STYLE]
    if type(style) is expert_parallel.MoEParamShard:
        styles.register(_PARAM_STYLE, _ExpertParamShard(style.placement, shards_expert_dim=True))


class _ExpertParamShard(expert_parallel.MoEParamShard):
    """transformers' cut of expert parameters, which refuses E that g does not divide; ours makes its own."""

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        distributed_config = getattr(getattr(module, "config", None), "distributed_config", None)
        if getattr(distributed_config, "ep_implementation", None) != NAME:
            super().shard_param(module, param, mesh)


class ExpertParallelism:
    """What transformers calls for each experts module: all layers of one model get one engine.

    Args:
        config: of the engines.
    """

    def __init__(self, config: SwiftMoEConfig) -> None:
        self._config = config
        self._latest: weakref.ref[AdaptiveModel] | None = None

    def __call__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> SwiftMoEExpertParallel:
        """As `EPImplementation`'s constructor."""
        latest = None if self._latest is None else self._latest()
        # transformers slices one mesh for all modules of a model, and makes another for the next model.
        if latest is None or latest.mesh is not ep_mesh:
            latest = AdaptiveModel(ep_mesh, tp_mesh, self._config)
            self._latest = weakref.ref(latest)
        return SwiftMoEExpertParallel(experts, ep_mesh, tp_mesh, latest)


class AdaptiveModel:
    """The adaptive layers of one model, with their engine.

    Args:
        mesh: the ranks of this rank's expert group.
        tp_mesh: the ranks with the same tokens.
        config: the engine's, but for the groups.
    """

    def __init__(self, mesh: Any, tp_mesh: Any, config: SwiftMoEConfig) -> None:
        self.mesh = mesh
        self.layers: list[SwiftMoEExpertParallel] = []
        device = torch.device("cpu")
        if mesh.device_type != "cpu":
            device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
        config = dataclasses.replace(config, expert_parallel_size=mesh.size())
        self.engine = SwiftMoEEngine(nn.ModuleList(), config, device=device)
        group = self.engine.group
        assert group is not None
        # transformers' groups are neighbours, too, since it combines token dispatch with no pipeline.
        assert list(group.expert.ranks) == mesh.mesh.tolist(), mesh
        if tp_mesh.size() > 1:
            # Each computes a share of the tokens. The dense part, and so the rest of that mesh, is transformers'.
            group.tensor = RankGroup(tp_mesh.get_group())
        self._prepared_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self_ref = weakref.ref(self)

        def prepare(optimizer: Optimizer, *_: object) -> None:
            if (model := self_ref()) is not None:
                model.prepare(optimizer)

        # Anyone's optimizer: transformers' Trainer has no other place between making one and its first step.
        hook = register_optimizer_step_pre_hook(prepare)
        weakref.finalize(self, hook.remove)

    def attach(self) -> None:
        """Let the engine take the layers over, once all have been read. A collective."""
        if all(layer.is_cut_by_rows for layer in self.layers):
            self.engine.attach(nn.ModuleList(layer.experts for layer in self.layers))

    def prepare(self, optimizer: Optimizer) -> None:
        """Prepare an optimizer of these experts before its first step."""
        if optimizer in self._prepared_optimizers:
            return
        ids = {id(p) for p in self.engine.module.parameters()}
        if any(id(p) in ids for group in optimizer.param_groups for p in group["params"]):
            self.engine.prepare_optimizer(optimizer)
            self._prepared_optimizers.add(optimizer)


class SwiftMoEExpertParallel(expert_parallel.EPImplementation):
    """One experts module of transformers under the engine.

    Args:
        experts: on meta, of the fused layout; its parameters are replaced.
        ep_mesh: the ranks of this rank's expert group.
        tp_mesh: the ranks with the same tokens.
        model: with the engine.

    Attributes:
        experts: what computes, with the parameters that the module itself has, too.
        is_cut_by_rows: whether the parameters have been read, and are the engine's.

    Raises:
        ValueError: for experts that `convert` would not take over.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any, model: AdaptiveModel) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._host, self._model, self.is_cut_by_rows = experts, model, False
        parameters = dict(experts.named_parameters(recurse=False))
        for name, parameter in parameters.items():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            experts.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        experts.num_experts = len(next(iter(parameters.values())))
        self.experts = as_experts(experts)
        for name, whole in self.experts.expert_parameters().items():
            delattr(experts, name)
            experts.register_buffer(name, cut_by_experts(whole, ep_mesh))
        experts.swiftmoe_engine = model.engine
        # An attribute of the instance, before the class's method.
        experts.train = self._train_host
        model.layers.append(self)

    def _train_host(self, mode: bool = True) -> nn.Module:
        """The module's `train`, until its parameters have been read."""
        if self._host._parameters and not any(p.is_meta for p in self._host.parameters()):
            del self._host.train
            self._cut_by_rows()
        return nn.Module.train(self._host, mode)

    @torch.no_grad()
    def _cut_by_rows(self) -> None:
        group = self._model.engine.group
        assert group is not None
        loaded = dict(self._host.named_parameters(recurse=False))
        self._host._parameters.clear()
        # In the module's own order, in which an optimizer has them: files are read in another.
        for name in self.experts.expert_parameters():
            rows = nn.Parameter(cut_by_rows(loaded[name], group), requires_grad=loaded[name].requires_grad)
            for module in (self._host, self.experts):
                module.register_parameter(name, rows)
        self.is_cut_by_rows = True
        self._model.attach()

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], top_k_index [T, K] int, top_k_weights [T, K] -> [T, D]."""
        if torch.is_grad_enabled():
            self._model.engine.layers[0].collector.syncs = _ends_accumulation()
        output: Tensor = self.experts(hidden_states, top_k_index, top_k_weights)
        return output


def _ends_accumulation() -> bool:
    """Whether the running micro-batch is the last before an optimizer step, as Accelerate and the Trainer say."""
    # A loop without Accelerate does not say, and each micro-batch is then collected.
    accelerate_state = sys.modules.get("accelerate.state")
    return accelerate_state is None or bool(accelerate_state.GradientState().sync_gradients)
