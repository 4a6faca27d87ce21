"""Stock code that knows plain tensors alone, on sharded parameters."""

from __future__ import annotations

import functools
from contextlib import ExitStack

from torch.distributed.tensor.experimental import implicit_replication

from swiftmoe_lightning.distributed.dtensor_random import handle_random
from swiftmoe_lightning.distributed.dtensor_refusals import refuse_local_parts
from swiftmoe_lightning.distributed.dtensor_scalars import handle_scalars
from swiftmoe_lightning.distributed.dtensor_writes import count_writes


@functools.cache
def extend_dtensors() -> ExitStack:
    """For the rest of the process, let sharded parameters stand where plain tensors do, with the same result.

    In one list with plain tensors, which are equal on all ranks, so they count as replicated: averaged weights,
    `torch.nn.utils.clip_grad_norm_`, norms to log. Numbers are of the whole tensor, draws are as on one process,
    every write counts, and what would take a part for the whole is refused.
    """
    handle_scalars()
    handle_random()
    count_writes()
    refuse_local_parts()
    stack = ExitStack()
    stack.enter_context(implicit_replication())
    # Kept by the cache: to drop it would end the context.
    return stack
