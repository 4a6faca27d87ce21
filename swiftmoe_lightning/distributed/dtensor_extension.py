"""Lets code that was written for plain tensors work on sharded parameters."""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack

from torch.distributed.tensor.experimental import implicit_replication

from swiftmoe_lightning.distributed.dtensor_random import handle_random
from swiftmoe_lightning.distributed.dtensor_refusals import refuse_local_parts
from swiftmoe_lightning.distributed.dtensor_scalars import handle_scalars
from swiftmoe_lightning.distributed.dtensor_writes import count_writes


@functools.cache
def extend_dtensors() -> ExitStack:
    """For the rest of the process, let sharded parameters be used as plain tensors are, with the same results.

    They may share a list with plain tensors, which count as replicated, since all ranks have equal ones: averaged
    weights, `torch.nn.utils.clip_grad_norm_`, norms to log. Scalars are of the whole tensor, random values are those of
    one process, every write counts, and what would treat this rank's shard as the whole tensor raises.
    """
    # Rows that are cut over two axes are gathered over one axis after the other, of which torch warns each rank.
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_is_news)
    handle_scalars()
    handle_random()
    count_writes()
    refuse_local_parts()
    stack = ExitStack()
    stack.enter_context(implicit_replication())
    # The cache keeps the stack alive, and with it the context.
    return stack


def _is_news(record: logging.LogRecord) -> bool:
    return "sequential all_gather" not in record.getMessage()
