"""What of torch is not public and is needed here and in the engine."""

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
        # The number of the backward that runs; what is called at its end.
        torch._C: ["_current_graph_task_id"],
        torch.autograd.Variable: ["_execution_engine"],
        # DTensors' own treatment of operators, and what they wrap.
        DTensor: ["_op_dispatcher", "_local_tensor", "_spec"],
        DTensor._op_dispatcher: ["_custom_op_handlers"],
        # Where ranks meet outside of collectives.
        dist.distributed_c10d: ["_get_default_store"],
        dist.ProcessGroup: ["_get_backend"],
        # Which parameters DDP leaves alone; FSDP2's state of one.
        DistributedDataParallel: ["_set_params_and_buffers_to_ignore_for_model"],
        fully_shard: ["state"],
    },
    "torch>=2.11",
)
