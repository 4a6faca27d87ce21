"""The expert layer's operations. Each is a file with its plain torch version; its Triton kernels are in `triton/`."""

from swiftmoe_lightning.ops.activation import ACTIVATIONS, Activation, activate
from swiftmoe_lightning.ops.grouped import expert_mlp, is_factor
from swiftmoe_lightning.ops.layer import expert_layer, expert_rows
from swiftmoe_lightning.ops.memory import reused_empty
from swiftmoe_lightning.ops.orthogonalize import orthogonalize
from swiftmoe_lightning.ops.permute import combine, permute, unpermute
from swiftmoe_lightning.ops.quantize import SCALE_BYTES, dequantize_rows, quantize_rows
from swiftmoe_lightning.ops.regroup import regroup
from swiftmoe_lightning.ops.route import SCORES, Routing, all_finite, route, route_to, score_logits
from swiftmoe_lightning.ops.sort import SortedAssignments, sort_assignments

__all__ = [
    "ACTIVATIONS",
    "SCALE_BYTES",
    "SCORES",
    "Activation",
    "Routing",
    "SortedAssignments",
    "activate",
    "all_finite",
    "combine",
    "dequantize_rows",
    "expert_layer",
    "expert_mlp",
    "expert_rows",
    "is_factor",
    "orthogonalize",
    "permute",
    "quantize_rows",
    "regroup",
    "reused_empty",
    "route",
    "route_to",
    "score_logits",
    "sort_assignments",
    "unpermute",
]
