"""Everything that calls torch.distributed: groups of ranks, their exchanges, and row-sharded parameters."""

from swiftmoe_lightning.distributed import private as private
from swiftmoe_lightning.distributed.dtensor_extension import extend_dtensors
from swiftmoe_lightning.distributed.expert_group import ExpertGroup
from swiftmoe_lightning.distributed.group import PendingExchange, RankGroup
from swiftmoe_lightning.distributed.sharding import (
    first_row,
    full_tensor,
    is_first_copy,
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
from swiftmoe_lightning.distributed.store_barrier import store_barrier

__all__ = [
    "ExpertGroup",
    "PendingExchange",
    "RankGroup",
    "extend_dtensors",
    "first_row",
    "full_tensor",
    "is_first_copy",
    "is_sharded",
    "local_rows",
    "local_shard",
    "shard_from_rank_zero",
    "shard_of",
    "shard_whole_values",
    "sharded_from_local",
    "sharded_like",
    "store_barrier",
    "write_counts",
]
