"""A barrier before collectives that users call by hand, and could call on one rank only by mistake."""

from __future__ import annotations

import itertools
import logging
import time
from typing import Final

import torch.distributed as dist

_log = logging.getLogger(__name__)
_call_numbers = itertools.count()
_POLL_S: Final = 0.02
_WARN_AFTER_S: Final = 20


def store_barrier(call: str, timeout_s: float) -> None:
    """Wait until every rank has called this, through the launcher's store instead of a collective.

    Args:
        call: the name of the call that waits, for messages.
        timeout_s: seconds to wait.

    Raises:
        RuntimeError: after `timeout_s`, naming the missing ranks. After 20 s a warning names them.
    """
    if dist.get_world_size() == 1:
        return
    store, start, number = dist.distributed_c10d._get_default_store(), time.monotonic(), next(_call_numbers)
    keys = [f"swiftmoe/barrier/{number}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], call)
    warned = False
    while not store.check(keys):
        waited = time.monotonic() - start
        if waited > _WARN_AFTER_S and not warned or waited > timeout_s:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            message = (
                f"rank {dist.get_rank()} has waited {waited:.0f} s in {call} for ranks {missing}. It gathers "
                "experts from all ranks: call it on every rank (outside of `if rank == 0:`); one of them writes. "
                "(FAQ: missing-ranks)"
            )
            if waited > timeout_s:
                raise RuntimeError(message)
            _log.warning(message)
            warned = True
        time.sleep(_POLL_S)
