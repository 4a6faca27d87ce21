"""What the axes of Accelerate's `ParallelismConfig` mean for the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swiftmoe_lightning.config import SwiftMoEConfig, check_config
from swiftmoe_lightning.engine import SwiftMoEEngine

if TYPE_CHECKING:
    from accelerate import Accelerator

_KNOWN_TYPES: Final = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
# Accelerate's axes, outermost first.
_AXES: Final = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
_TYPE_OF_DEVICE: Final = {"cpu": "MULTI_CPU", "cuda": "MULTI_GPU", "xpu": "MULTI_XPU", "npu": "MULTI_NPU"}


class ParallelAxes(NamedTuple):
    """What an engine is made of.

    Attributes:
        config: with the dense mode and the expert groups that the axes ask for.
        tensor_mesh: the axes of Accelerate's mesh that go to the engine as `tensor_mesh`; () for none.
    """

    config: SwiftMoEConfig
    tensor_mesh: tuple[str, ...] = ()


def parallel_axes(sizes: Mapping[str, int], config: SwiftMoEConfig) -> ParallelAxes:
    """What the sizes of Accelerate's axes ask of an engine.

    The dense part is cut as Accelerate itself would cut it by FSDP2: over dp_shard and cp together, with a copy for
    each index of dp_replicate. Without tp, the ranks of a copy are an expert group. Ranks along tp have the same
    tokens; those along cp have different parts of a sequence, which is all that experts need to know of them.

    Args:
        sizes: of the axes "dp_replicate", "dp_shard", "cp", "sp" and "tp"; those that are left out are 1.
        config: the user's.

    Raises:
        ValueError: for sizes that do not go together, or with the config.
    """
    replicate, shard, context, sequence, tensor = (sizes.get(axis, 1) for axis in _AXES)
    if sequence > 1:
        raise ValueError(
            f"sp_size={sequence} is DeepSpeed's sequence parallelism, which needs DeepSpeed, and that cannot be "
            "combined with spread experts. Use cp_size, context parallelism, in its place."
        )
    num_parts = shard * context
    if num_parts == 1 and tensor == 1:
        return ParallelAxes(config)
    if replicate > 1 and num_parts == 1:
        raise ValueError(
            f"dp_replicate_size={replicate} with tp_size={tensor} would average tensor-parallel parameters by "
            "DistributedDataParallel, which cannot. Set dp_shard_size in place of dp_replicate_size."
        )
    dense = "ddp" if num_parts == 1 else "fsdp2" if replicate == 1 else "hsdp"
    config = replace(config, dense=dense)
    if replicate > 1 and tensor == 1:
        if config.expert_parallel_size not in (None, num_parts):
            raise ValueError(
                f"expert_parallel_size={config.expert_parallel_size}, and each of the {replicate} copies of the dense "
                f"part is cut over {num_parts} processes (dp_shard_size x cp_size), which are an expert group. Leave "
                "expert_parallel_size out."
            )
        config = replace(config, expert_parallel_size=num_parts)
    if tensor == 1:
        return ParallelAxes(config)
    if shard > 1 and context > 1:
        raise ValueError(
            f"dp_shard_size={shard}, cp_size={context} and tp_size={tensor} cannot be combined: the dense part is cut "
            "over one axis beside tp. Set dp_shard_size or cp_size to 1, and dp_replicate_size for more processes."
        )
    return ParallelAxes(config, tuple(axis for axis in _AXES if sizes.get(axis, 1) > 1))


def make_engine(accelerator: Accelerator, model: nn.Module, config: SwiftMoEConfig | None) -> SwiftMoEEngine:
    """The engine of a model on the accelerator's axes. A collective.

    Args:
        accelerator: checked by `check_processes`.
        model: with `Experts`, not prepared before; its dense part may be tensor-parallel on `torch_device_mesh["tp"]`.
        config: None takes the defaults.

    Raises:
        ValueError: for axes that do not go together, or with the config.
    """
    sizes = _sizes_of(accelerator)
    axes = parallel_axes(sizes, check_config(config))
    if sizes.get("cp", 1) > 1:
        # What Accelerate does to a model that it prepares itself.
        accelerator._prepare_cp(model)
    tensor_mesh = _mesh_of(accelerator, axes.tensor_mesh) if axes.tensor_mesh else None
    return SwiftMoEEngine(model, axes.config, device=accelerator.device, tensor_mesh=tensor_mesh)


def _sizes_of(accelerator: Accelerator) -> dict[str, int]:
    parallelism: Any = getattr(accelerator, "parallelism_config", None)
    return {} if parallelism is None else {axis: getattr(parallelism, f"{axis}_size") for axis in _AXES}


def _mesh_of(accelerator: Accelerator, axes: tuple[str, ...]) -> DeviceMesh:
    if len(axes) > 1:
        mesh: DeviceMesh = accelerator.torch_device_mesh[axes]
        return mesh
    # No data-parallel axis, but the engine's mesh has one.
    shape = (1, dist.get_world_size())
    return init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp_shard", *axes))


def check_processes(accelerator: Accelerator, kind: str, on_cpu: str) -> None:
    """Make sure that Accelerate, torch and the launcher agree on the processes, and that nothing else cuts the model.

    For context parallelism on GPUs, Accelerate insists on its FSDP2. The engine cuts the dense part instead, and the
    accelerator goes on as a data-parallel one.

    Args:
        accelerator: of the processes.
        kind: its name in messages.
        on_cpu: the code that makes it without GPUs, for messages.

    Raises:
        ValueError: for processes that do not agree, or another parallelism.
    """
    started = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but this {kind} sees {accelerator.num_processes}: each would "
            f"train alone. Without GPUs make it as {on_cpu}. (FAQ: one-process)"
        )
    if accelerator.distributed_type.name == "FSDP" and _sizes_of(accelerator).get("cp", 1) > 1:
        kinds = type(accelerator.distributed_type)
        accelerator.state.distributed_type = kinds[_TYPE_OF_DEVICE[accelerator.device.type]]
    if accelerator.distributed_type.name not in _KNOWN_TYPES:
        raise ValueError(
            f"Accelerate is set up for {accelerator.distributed_type.name}, which cuts the model itself, and cannot be "
            "combined with spread experts. Leave DeepSpeed, FSDP and Megatron-LM out. For a dense part that is cut as "
            "by FSDP2, set ParallelismConfig(dp_shard_size=...) or SwiftMoEConfig(dense='fsdp2'). Pipeline parallelism "
            "has no substitute: its stages run at different times, and an expert layer needs all its ranks at once. "
            "(FAQ: other-parallelism)"
        )
