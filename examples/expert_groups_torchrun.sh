#!/bin/bash
# On each node: NODES=2 HEAD=first-node:29500 bash examples/expert_groups_torchrun.sh
# Ranks of a node are consecutive, so with 8 ranks a node a group of 8 is a node, and one of 16 is two of them.
set -eu
torchrun --nnodes="$NODES" --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint="$HEAD" \
    examples/expert_groups.py --accelerator gpu --num-nodes "$NODES" --devices 8 --group-size 8
