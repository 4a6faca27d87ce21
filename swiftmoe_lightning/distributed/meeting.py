"""Collectives that a user starts by hand, which one rank alone could start by mistake."""

from __future__ import annotations

import itertools
import logging
import time
from typing import Final

import torch.distributed as dist

_log = logging.getLogger(__name__)
_numbers = itertools.count()
_POLL_S: Final = 0.02
_WARN_AFTER_S: Final = 20


def meet(what: str, patience_s: float) -> None:
    """Wait until every rank is here, in the launcher's store instead of a collective.

    Args:
        what: the call that waits, for messages.
        patience_s: seconds until it is an error.

    Raises:
        RuntimeError: when patience is over, naming the ranks that are missing; the log says so after 20 s.
    """
    if dist.get_world_size() == 1:
        return
    store, start, number = dist.distributed_c10d._get_default_store(), time.monotonic(), next(_numbers)
    keys = [f"swiftmoe/meeting/{number}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], what)
    warned = False
    while not store.check(keys):
        waited = time.monotonic() - start
        if waited > _WARN_AFTER_S and not warned or waited > patience_s:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            said = (
                f"rank {dist.get_rank()} has waited {waited:.0f} s in {what} for ranks {missing}. It gathers "
                "experts from all ranks: call it on every rank (outside of `if rank == 0:`); one of them writes."
            )
            if waited > patience_s:
                raise RuntimeError(said)
            _log.warning(said)
            warned = True
        time.sleep(_POLL_S)
