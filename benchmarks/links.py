"""Network namespaces with links of a stated speed, to start ranks in by hand.

python -m benchmarks.links up --nodes 2 --mbit 1000     # makes them, and prints how to start a process in each
python -m benchmarks.links down --nodes 2               # removes them

Needs Linux, root and iproute2. The benchmarks that take --mbit make and remove links of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.common.links import Links, make, missing_for_links, remove


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.links", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--nodes", type=int, default=2, help="namespaces, each with one link (default: 2)")
    parser.add_argument("--mbit", type=int, default=1000, help="megabits a second, each way (default: 1000)")
    parser.add_argument("--prefix", default="swiftmoe", help="what their names begin with (default: swiftmoe)")
    given = parser.parse_args(argv)
    if missing := missing_for_links():
        parser.error(missing)
    try:
        links = Links(num_ranks=given.nodes, mbit=given.mbit, name=given.prefix)
    except ValueError as error:
        parser.error(str(error))
    if given.action == "down":
        remove(links)
        return
    try:
        make(links)
    except RuntimeError as error:
        parser.error(f"{error}. Remove what is there with the same options and `down`, and try again.")
    for node in range(links.num_nodes):
        print(
            f"ip netns exec {links.name}-{node} env GLOO_SOCKET_IFNAME=uplink torchrun --nnodes {links.num_nodes} "
            f"--node-rank {node} --master-addr 10.0.0.1 --master-port 29500 ..."
        )


if __name__ == "__main__":
    main()
