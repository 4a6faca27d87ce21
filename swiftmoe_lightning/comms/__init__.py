"""torch.distributed in one place: the group of ranks, its exchanges, and row-sharded masters."""

from swiftmoe_lightning.comms.group import ExpertGroup, PendingExchange
from swiftmoe_lightning.comms.masters import (
    full_tensor,
    is_master,
    local_part,
    local_rows,
    local_shard,
    master_from_local,
    master_like,
    mix_with_plain_tensors,
    shard_from_rank_zero,
    shard_whole_values,
)
from swiftmoe_lightning.comms.numbers import read_whole_numbers

__all__ = [
    "ExpertGroup",
    "PendingExchange",
    "full_tensor",
    "is_master",
    "local_part",
    "local_rows",
    "local_shard",
    "master_from_local",
    "master_like",
    "mix_with_plain_tensors",
    "read_whole_numbers",
    "shard_from_rank_zero",
    "shard_whole_values",
]
