"""Everything that calls torch.distributed: groups of ranks, their exchanges, and row-sharded parameters."""

from swiftmoe_lightning.distributed import private as private
from swiftmoe_lightning.distributed.dtensor_extension import extend_dtensors
from swiftmoe_lightning.distributed.expert_group import ExpertGroup
from swiftmoe_lightning.distributed.group import PendingExchange, RankGroup
from swiftmoe_lightning.distributed.host_device import HostCopy, to_device, to_host
from swiftmoe_lightning.distributed.host_group import FileMessage, HostGroup
from swiftmoe_lightning.distributed.loaded_experts import cut_by_experts, cut_by_rows
from swiftmoe_lightning.distributed.matrix_exchange import (
    CutMatrices,
    apply_to_whole,
    refuse_different_matrices,
    rows_by_rank,
)
from swiftmoe_lightning.distributed.node_groups import NodeGroups, make_node_groups
from swiftmoe_lightning.distributed.phase import phase
from swiftmoe_lightning.distributed.sharding import (
    first_row,
    full_tensor,
    gradient_shard,
    is_cut_over,
    is_first_copy,
    is_on,
    is_sharded,
    local_rows,
    local_shard,
    shard_from_rank_zero,
    shard_of,
    shard_whole_values,
    sharded_from_local,
    sharded_like,
    write_counts,
)
from swiftmoe_lightning.distributed.side_stream import SideStream, side_stream
from swiftmoe_lightning.distributed.store_barrier import store_barrier
from swiftmoe_lightning.distributed.tensor_parallel import gather_shares, take_share
from swiftmoe_lightning.distributed.wire import packed_bytes, returned_dtype

__all__ = [
    "CutMatrices",
    "ExpertGroup",
    "FileMessage",
    "HostCopy",
    "HostGroup",
    "NodeGroups",
    "PendingExchange",
    "RankGroup",
    "SideStream",
    "apply_to_whole",
    "cut_by_experts",
    "cut_by_rows",
    "extend_dtensors",
    "first_row",
    "full_tensor",
    "gather_shares",
    "gradient_shard",
    "is_cut_over",
    "is_first_copy",
    "is_on",
    "is_sharded",
    "local_rows",
    "local_shard",
    "make_node_groups",
    "packed_bytes",
    "phase",
    "refuse_different_matrices",
    "returned_dtype",
    "rows_by_rank",
    "shard_from_rank_zero",
    "shard_of",
    "shard_whole_values",
    "sharded_from_local",
    "sharded_like",
    "side_stream",
    "store_barrier",
    "take_share",
    "to_device",
    "to_host",
    "write_counts",
]
