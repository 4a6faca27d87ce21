"""The private names of torch that this package uses here, in `modules` and in `engine`; checked at import."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from swiftmoe_lightning.private_names import check_names

check_names(
    "torch",
    {
        # The number of the running backward, and its node; callbacks at its end.
        torch._C: ["_current_graph_task_id", "_current_autograd_node"],
        torch.autograd.Variable: ["_execution_engine"],
        # Numbers of autograd's nodes; the hooks of activation checkpointing; what runs a function's backward.
        torch._C._autograd: ["_get_sequence_nr", "_top_saved_tensors_default_hooks"],
        torch.autograd.function: ["BackwardCFunction"],
        # DTensor's handlers of operators; its local tensor and layout.
        DTensor: ["_op_dispatcher", "_local_tensor", "_spec"],
        DTensor._op_dispatcher: ["_custom_op_handlers"],
        # The launcher's key-value store; the options of a group.
        dist.distributed_c10d: ["_get_default_store"],
        dist.ProcessGroup: ["_get_backend"],
        # Parameters that DDP ignores; FSDP2's state of a module.
        DistributedDataParallel: ["_set_params_and_buffers_to_ignore_for_model"],
        fully_shard: ["state"],
    },
    "torch>=2.11",
)
