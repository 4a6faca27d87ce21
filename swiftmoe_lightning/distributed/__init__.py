"""Everything that calls torch.distributed: the group of ranks, its exchanges, and row-sharded parameters."""

from swiftmoe_lightning.distributed import private as private
from swiftmoe_lightning.distributed.dtensor_extension import extend_dtensors
from swiftmoe_lightning.distributed.group import ExpertGroup, PendingExchange
from swiftmoe_lightning.distributed.sharding import (
    first_row,
    full_tensor,
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
    "extend_dtensors",
    "first_row",
    "full_tensor",
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
