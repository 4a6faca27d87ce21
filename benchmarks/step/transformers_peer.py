"""Expert parallelism of transformers: its experts, its all-to-all, and FSDP2 as it applies it."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.step.training import TrainingSystem
from benchmarks.step.workload import Model, RoutedExperts, Workload, optimizer_of

_PARAMETER_STYLE, _MODULE_STYLE = "grouped_gemm", "ep_dispatch_experts"


def transformers_ep(workload: Workload) -> TrainingSystem:
    """The workload with transformers' "all_to_all" over all ranks, the plan of its own MoE models. A collective."""
    from transformers import Qwen3MoeConfig
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
    from transformers.distributed.utils import TransformersDeviceMesh
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes, num_ranks, model = workload.sizes, dist.get_world_size(), Model(workload)
    config = Qwen3MoeConfig(
        hidden_size=sizes.dim, moe_intermediate_size=sizes.hidden_dim, num_experts=sizes.experts, hidden_act="silu"
    )
    # As `from_pretrained` does: its default on this machine, and how many ranks have batches of their own.
    config._experts_implementation = "grouped_mm"
    config.distributed_config = DistributedConfig(fsdp_size=num_ranks, ep_size=num_ranks)
    model.config = config  # type: ignore[assignment]
    expert_plan = {}
    for layer, block in enumerate(model.blocks):
        experts = Qwen3MoeExperts(config)
        experts.load_state_dict(block.moe.experts.state_dict())
        block.moe = RoutedExperts(block.moe.router, experts)
        name = f"blocks.{layer}.moe.experts"
        # Parameters first: a module's forward looks at how its own were cut.
        expert_plan |= dict.fromkeys((f"{name}.gate_up_proj", f"{name}.down_proj"), _PARAMETER_STYLE)
        expert_plan[name] = _MODULE_STYLE
    meshes = TransformersDeviceMesh(
        init_device_mesh("cpu", (num_ranks, 1), mesh_dim_names=("fsdp", "tp")),
        init_device_mesh("cpu", (1, num_ranks), mesh_dim_names=("efsdp", "ep")),
    )
    apply_expert_parallelism(model, meshes.get_mesh("ep"), meshes.get_mesh("tp"), expert_plan, "all_to_all")
    dense_plan = {f"blocks.{layer}": "free_full_weight" for layer in range(sizes.layers)}
    apply_fully_sharded_data_parallelism(model, meshes, dense_plan, expert_plan)
    experts_of = {id(p) for name, p in model.named_parameters() if name.rpartition(".")[0] in expert_plan}
    groups = [[p for p in model.parameters() if (id(p) in experts_of) is is_expert] for is_expert in (True, False)]
    # transformers' Trainer groups by mesh, too, which fused optimizers need.
    optimizer = optimizer_of([{"params": group} for group in groups])
    return TrainingSystem(model=model, optimizer=optimizer, source=model)
