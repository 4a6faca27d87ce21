"""The ranks over which experts are spread: R groups of g ranks, each of which holds all experts.

W = R * g ranks. Rank r * g + j of the mesh is rank j of expert group r.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swiftmoe_lightning.distributed.group import RankGroup, meshes
from swiftmoe_lightning.distributed.node_groups import make_node_groups

AXIS: Final = "expert"
DENSE_AXIS: Final = "dense"
_REPLICATE: Final = "replicate"


class ExpertGroup:
    """This rank's expert group, and the ranks across all groups that own the same rows.

    Args:
        device_type: of the experts' working weights, and of what is sent.
        expert_parallel_size: g; None takes all ranks. It must divide their number.
        ranks_per_node: neighbouring ranks that share a node; None takes torchrun's LOCAL_WORLD_SIZE, or one
            node without it.
        mesh: [R, g] or [g], of all ranks; None makes one of neighbours.
        tensor_mesh: [..., n], of all ranks, whose last axis are the ranks with the same tokens; None if all ranks have
            tokens of their own.
        shard_device_type: of the sharded parameters; None takes `device_type`.
        exchange: at how many levels tokens and weights travel, as in `SwiftMoEConfig`.

    Attributes:
        mesh: [R, g], axes "replicate" and "expert" (a given one keeps its names); [g] for one group.
        shard_mesh: of the sharded parameters: their rows are cut over "expert" (at two levels over the "number" of a
            rank on its node, then over "node"), and each part over "replicate".
        expert: the g ranks of this group. For counts and tokens.
        weights: the groups in which weights travel, from the owners of rows on: the same ranks, or at two levels those
            of the same number, then those of the node. They are groups of their own, so that counts and tokens do not
            queue behind weights; and where some ranks exchange weights and others do not, the next gather of counts
            still runs, and its check reports them.
        replicate: the R ranks, one of each group, between which a part of the rows is cut; None for one group.
        tensor: the n ranks that have the same tokens as this one; None where it is alone.
        ranks_per_node: neighbouring ranks of the group that share a node.
        nodes: the groups in which tokens may travel at two levels; None where all travels at one.

    Raises:
        RuntimeError: when no process group is initialized.
        ValueError: for a mesh that is not of all ranks.
    """

    def __init__(
        self,
        device_type: str,
        expert_parallel_size: int | None = None,
        ranks_per_node: int | None = None,
        mesh: DeviceMesh | None = None,
        tensor_mesh: DeviceMesh | None = None,
        *,
        shard_device_type: str | None = None,
        exchange: str = "flat",
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("ExpertGroup needs torch.distributed: call torch.distributed.init_process_group first.")
        self.mesh = _make_mesh(device_type, expert_parallel_size) if mesh is None else _checked(mesh)
        self.expert = RankGroup(self.mesh.get_group(self.mesh.ndim - 1))
        self.replicate = RankGroup(self.mesh.get_group(0)) if self.mesh.ndim == 2 else None
        self._tensor_mesh, self.tensor = tensor_mesh, None
        if tensor_mesh is not None:
            _check_tensor_mesh(tensor_mesh)
            self.tensor = RankGroup(tensor_mesh.get_group(tensor_mesh.ndim - 1))
        launched = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        self.ranks_per_node = ranks_on_a_node(self.expert.ranks, launched if ranks_per_node is None else ranks_per_node)
        self.nodes = make_node_groups(self.expert, self.ranks_per_node, torch.device(device_type), exchange)
        cuts = {AXIS: self.expert} if self.nodes is None else {"number": self.nodes.node, "node": self.nodes.rail}
        self.weights = [group.second(device_type) for group in reversed(cuts.values())]
        self.shard_mesh = self._make_shard_mesh(cuts, shard_device_type or device_type)

    def _make_shard_mesh(self, cuts: dict[str, RankGroup], device_type: str) -> DeviceMesh:
        ranks = self.mesh.mesh.view(-1, self.expert.size)
        if self.nodes is not None:
            ranks = ranks.unflatten(1, (self.nodes.rail.size, self.nodes.node.size))
        if self.replicate is not None:
            cuts = {**cuts, _REPLICATE: self.replicate}
        return DeviceMesh.from_group(
            [group.process_group for group in cuts.values()],
            device_type,
            mesh=ranks.permute(*reversed(range(ranks.ndim))).reshape([group.size for group in cuts.values()]),
            mesh_dim_names=tuple(cuts),
        )

    @property
    def num_ranks(self) -> int:
        """W, of all groups."""
        return self.mesh.size()

    @property
    def num_data_ranks(self) -> int:
        """How many ranks have tokens of their own."""
        return self.num_ranks // (1 if self.tensor is None else self.tensor.size)

    @property
    def token_bytes(self) -> dict[str, int]:
        """Bytes of tokens that this rank has sent since the start: "inside" its node, and "between" nodes."""
        sent = self._bytes_by_link(self.expert)
        if self.nodes is not None:
            sent["inside"] += int(self.nodes.node.bytes_to_others_n.sum())
            sent["between"] += int(self.nodes.rail.bytes_to_others_n.sum())
        return sent

    @property
    def weight_bytes(self) -> dict[str, int]:
        """The same of experts' weights and their gradients, in this group."""
        if self.nodes is None:
            return self._bytes_by_link(*self.weights)
        rail, node = self.weights
        return {"inside": int(node.bytes_to_others_n.sum()), "between": int(rail.bytes_to_others_n.sum())}

    def _bytes_by_link(self, ranks: RankGroup) -> dict[str, int]:
        node_g = np.arange(ranks.size) // self.ranks_per_node
        is_near_g = node_g == node_g[ranks.rank]
        sent_g = ranks.bytes_to_others_n
        return {"inside": int(sent_g[is_near_g].sum()), "between": int(sent_g[~is_near_g].sum())}

    def dense_mesh(self, is_hybrid: bool) -> DeviceMesh:
        """The mesh over which FSDP2 cuts the dense part. A collective.

        Args:
            is_hybrid: cut it over the ranks of a group, and let all groups have copies.
        """
        if self._tensor_mesh is not None:
            assert self._tensor_mesh.mesh_dim_names is not None
            return self._tensor_mesh[self._tensor_mesh.mesh_dim_names[:-1]]
        if is_hybrid or self.mesh.ndim == 1:
            return self.mesh
        return init_device_mesh(self.mesh.device_type, (self.num_ranks,), mesh_dim_names=(DENSE_AXIS,))

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of all."""
        return self.expert.rank == 0 and (self.replicate is None or self.replicate.rank == 0)

    def all_gather(self, row: Tensor) -> Tensor:
        """[m] -> [W, m]: every rank's `row`, also of other groups."""
        rows = self.expert.all_gather(row)
        return rows if self.replicate is None else self.replicate.all_gather(rows.flatten()).view(-1, len(row))

    def all_reduce(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `value` over all ranks, in place, by a `torch.distributed.ReduceOp`. Returns it."""
        self.expert.all_reduce(value, op)
        return value if self.replicate is None else self.replicate.all_reduce(value, op)

    def broadcast(self, value: Tensor) -> Tensor:
        """Write the first rank's `value` to all ranks' `value`. Returns it."""
        self.expert.broadcast(value)
        return value if self.replicate is None else self.replicate.broadcast(value)

    def broadcast_int(self, value: int, device: torch.device) -> int:
        """The first rank's whole number `value`, on every rank. It travels from `device` to `device`."""
        return int(self.broadcast(torch.tensor(value, device=device)).item())


def _make_mesh(device_type: str, expert_parallel_size: int | None) -> DeviceMesh:
    num_ranks = dist.get_world_size()
    size = num_ranks if expert_parallel_size is None else expert_parallel_size
    if size == num_ranks:
        return init_device_mesh(device_type, (num_ranks,), mesh_dim_names=(AXIS,))
    assert dist.group.WORLD is not None
    known = meshes.setdefault(dist.group.WORLD, {})
    if (device_type, size) not in known:
        shape, names = (num_ranks // size, size), (_REPLICATE, AXIS)
        known[device_type, size] = init_device_mesh(device_type, shape, mesh_dim_names=names)
    return known[device_type, size]


def _checked(mesh: DeviceMesh) -> DeviceMesh:
    num_ranks = dist.get_world_size()
    if mesh.ndim > 2 or mesh.size() != num_ranks:
        raise ValueError(
            f"mesh must have one axis (the expert group) or two (the replicate axis, then the expert group) with all "
            f"{num_ranks} ranks, got {mesh}. Name the axes that ranks with different tokens lie on: "
            'mesh["dp", "ep"].'
        )
    return mesh


def _check_tensor_mesh(mesh: DeviceMesh) -> None:
    num_ranks = dist.get_world_size()
    if mesh.ndim < 2 or mesh.size() != num_ranks or mesh.mesh_dim_names is None:
        raise ValueError(
            f"tensor_mesh must have names, all {num_ranks} ranks, and the tensor-parallel axis last, got {mesh}. Make "
            f'it as init_device_mesh(device_type, ({num_ranks // 2}, 2), mesh_dim_names=("dp", "tp")).'
        )


def ranks_on_a_node(ranks: Sequence[int], node_size: int) -> int:
    """How many neighbours of a group always share a node.

    Args:
        ranks: the group's, by their number in the world.
        node_size: ranks 0 to node_size - 1 are on the first node, the next as many on the second.

    Returns:
        The largest b for which ranks[0:b], ranks[b:2b], ... lie on one node each.
    """
    nodes = [rank // node_size for rank in ranks]
    return next(
        b
        for b in range(len(ranks), 0, -1)
        if all(len(set(nodes[first : first + b])) == 1 for first in range(0, len(ranks), b))
    )
