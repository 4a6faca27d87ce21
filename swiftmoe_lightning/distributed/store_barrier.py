"""Collectives that a user starts by hand, which one rank alone could start by mistake."""

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
    """Wait until every rank is here, in the launcher's store instead of a collective.

    Args:
        call: what waits, for messages.
        timeout_s: seconds until it is an error.

    Raises:
        RuntimeError: when they are over, naming the ranks that are missing; the log says so after 20 s.
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
                "experts from all ranks: call it on every rank (outside of `if rank == 0:`); one of them writes."
            )
            if waited > timeout_s:
                raise RuntimeError(message)
            _log.warning(message)
            warned = True
        time.sleep(_POLL_S)
