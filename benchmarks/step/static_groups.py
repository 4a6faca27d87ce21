"""Static expert parallelism with ZeRO-1: every expert stays on its rank, and on as many others as there are groups.

W = R * g ranks in R groups of g. A group holds each expert once, and its tokens stay in it. Ranks of different groups
that hold the same experts sum their gradients, and each of them updates a part of the weights. T tokens, D model dim,
E experts, K top-k, R rows received.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import swiftmoe_lightning as sml
from benchmarks.step.training import TrainingSystem
from benchmarks.step.workload import Model, RoutedExperts, Workload, optimizer_of
from swiftmoe_lightning.distributed import RankGroup
from swiftmoe_lightning.ops import combine, permute, sort_assignments


class StaticExperts(nn.Module):
    """This rank's E / g experts, and the way of all tokens of its group to them.

    Args:
        whole: all E experts, of which this rank copies its own.
        group: the g ranks that share the experts.
    """

    def __init__(self, whole: sml.Experts, group: RankGroup) -> None:
        super().__init__()
        self.num_experts, self._group = whole.num_experts, group
        num_local = self.num_experts // group.size
        self.local = sml.Experts(num_local, whole.dim, whole.hidden_dim)
        first = group.rank * num_local
        with torch.no_grad():
            for name, rows in whole.expert_parameters().items():
                self.local.expert_parameters()[name].copy_(rows[first : first + num_local])

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D], ids [T, K], weights [T, K] -> [T, D]."""
        group, num_local = self._group, self.local.num_experts
        by_expert = sort_assignments(expert_ids_TK, self.num_experts)
        counts_E = by_expert.counts_G.long()
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=group.process_group)
        send_splits = counts_E.view(group.size, -1).sum(1).tolist()
        receive_splits = received_E.view(group.size, -1).sum(1).tolist()
        arrived_RD = group.exchange_rows(permute(x_TD, by_expert), send_splits, receive_splits)
        local_ids_R = torch.arange(num_local).repeat(group.size).repeat_interleave(received_E)
        y_RD = self.local(arrived_RD, local_ids_R.unsqueeze(1), torch.ones(len(arrived_RD), 1))
        return combine(group.exchange_rows(y_RD, receive_splits, send_splits), weights_TK, by_expert)


class CutState:
    """Optimizer state of replicated parameters, cut over their R replicas.

    Args:
        parameters: of this rank, R of them alike on the ranks of `replicas`.
        replicas: those ranks.

    Attributes:
        shards: what the optimizer updates: this rank's part of each parameter, [elements / R].
    """

    def __init__(self, parameters: list[nn.Parameter], replicas: RankGroup) -> None:
        self._parameters, self._replicas = parameters, replicas
        uneven = [tuple(p.shape) for p in parameters if p.numel() % replicas.size]
        assert not uneven, f"{replicas.size} replicas must divide the elements of {uneven}"
        self.shards = [
            nn.Parameter(p.detach().view(replicas.size, -1)[replicas.rank].clone().contiguous()) for p in parameters
        ]

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """The parameters' gradients -> the shards', the mean over all ranks. A collective."""
        size, num_ranks = self._replicas.size, dist.get_world_size()
        for parameter, shard in zip(self._parameters, self.shards, strict=True):
            assert parameter.grad is not None
            splits = [shard.numel()] * size
            parts = self._replicas.start_all_to_all(parameter.grad.view(-1), splits, splits).wait()
            shard.grad = parts.view(size, -1).sum(0).div_(num_ranks)
            parameter.grad = None

    @torch.no_grad()
    def gather_weights(self) -> None:
        """The updated shards -> the parameters. A collective."""
        for parameter, shard in zip(self._parameters, self.shards, strict=True):
            parameter.copy_(self._replicas.all_gather(shard.detach()).view(parameter.shape))


def static_groups(workload: Workload) -> TrainingSystem:
    """The workload in two groups of static experts, or in one group a rank where there are two ranks. A collective."""
    model, num_ranks = Model(workload), dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, num_ranks // 2), mesh_dim_names=("replicate", "expert"))
    replicas, group = RankGroup(mesh.get_group("replicate")), RankGroup(mesh.get_group("expert"))
    for block in model.blocks:
        block.moe = RoutedExperts(block.moe.router, StaticExperts(block.moe.experts, group))
    experts = {name: p for name, p in model.named_parameters() if ".experts." in name}
    state = CutState(list(experts.values()), replicas)
    optimizer = optimizer_of([*(p for name, p in model.named_parameters() if name not in experts), *state.shards])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(experts))

    def update() -> None:
        state.sum_gradients()
        optimizer.step()
        state.gather_weights()

    return TrainingSystem(model=DistributedDataParallel(model), source=model, optimizer=optimizer, update=update)
