"""Tensor parallelism of the dense part under both of Lightning's strategies, on a mesh as their own strategies make."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swiftmoe_lightning.config import check_whole

# The names that Lightning's ModelParallelStrategy gives to the axes.
_DATA: Final = "data_parallel"
_TENSOR: Final = "tensor_parallel"


class TensorParallelMixin:
    """For strategies of Lightning: a device mesh of all ranks, and the same batches for ranks along its last axis."""

    root_device: torch.device
    _tensor_parallel_size: int | None
    _device_mesh: DeviceMesh | None = None

    def _set_tensor_parallel_size(self, size: int | None) -> None:
        """Keep the size of the mesh's last axis; without one there is no mesh.

        Raises:
            ValueError: for one that is no whole number of 1 or more.
        """
        if size is not None:
            check_whole(tensor_parallel_size=size)
        self._tensor_parallel_size = size

    @property
    def device_mesh(self) -> DeviceMesh:
        """All ranks, on axes "data_parallel" and "tensor_parallel".

        Raises:
            RuntimeError: before the processes have found each other, or without tensor_parallel_size.
        """
        if self._device_mesh is None:
            raise RuntimeError(
                "there is no device mesh: set tensor_parallel_size, and read it in configure_model or later."
            )
        return self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The samples of this rank: the same ones along the tensor-parallel axis."""
        if self._device_mesh is None:
            kwargs: dict[str, Any] = super().distributed_sampler_kwargs  # type: ignore[misc]
            return kwargs
        data = self._device_mesh[_DATA]
        return {"num_replicas": data.size(), "rank": data.get_local_rank()}

    def setup_environment(self) -> None:
        """Make the mesh once the processes have found each other. A collective."""
        super().setup_environment()  # type: ignore[misc]
        if self._tensor_parallel_size is not None and self._device_mesh is None:
            shape = mesh_shape(dist.get_world_size(), self._tensor_parallel_size)
            self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=(_DATA, _TENSOR))


def mesh_shape(num_ranks: int, tensor_parallel_size: int) -> tuple[int, int]:
    """Ranks along the data-parallel and the tensor-parallel axis.

    Raises:
        ValueError: when the size does not divide the ranks.
    """
    if num_ranks % tensor_parallel_size:
        sizes = ", ".join(str(size) for size in range(1, num_ranks + 1) if num_ranks % size == 0)
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} does not divide the {num_ranks} ranks. Set it to one of "
            f"{sizes}."
        )
    return num_ranks // tensor_parallel_size, tensor_parallel_size
