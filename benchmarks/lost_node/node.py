"""A rank of the example, which writes down when it starts, when each step ends and when the kill comes.

The clock is the same for all processes of a machine.
"""

import os
import runpy
import sys
import time
from pathlib import Path


def note(kind: object, step: int) -> None:
    """A line in the file of moments."""
    with Path(sys.argv[2]).open("a") as file:
        file.write(f"{kind} {step} {time.monotonic()}\n")


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        note("started", 0)
    import torch.distributed as dist

    from benchmarks.common.provenance import ROOT

    example = runpy.run_path(str(ROOT / "examples" / "go_on_after_a_lost_node.py"))

    def lose(step: int) -> None:
        if step == 13 and (dist.get_world_size(), dist.get_rank()) == (4, 2):
            note("killed", step)
        example["lose_a_node"](step)

    def after_step(step: int, _: float) -> None:
        if dist.get_rank() == 0:
            note(dist.get_world_size(), step)

    example["train"](sys.argv[1], 20, lose, after_step)
