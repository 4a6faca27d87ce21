"""Which dim of each of the experts' tensors counts hidden units, by which every expert can be cut over the ranks.

E experts, F hidden dim, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from swiftmoe_lightning.ops import Activation, is_factor
from swiftmoe_lightning.placement import HiddenLayout, hidden_slices

if TYPE_CHECKING:
    from swiftmoe_lightning.modules.experts import Experts

_NUM_ROWS: Final = 4


@dataclass(frozen=True)
class HiddenCut:
    """How one tensor [E, ...] is cut.

    Attributes:
        dim: that is cut; None leaves the tensor whole on every rank.
        layout: how the dim counts hidden units.
        pads: whether a rank's piece stands among zeros, in a tensor of the whole size.
    """

    dim: int | None
    layout: HiddenLayout = "single"
    pads: bool = False

    def parts(self, tensor: Tensor, world_size: int, rank: int) -> list[Tensor]:
        """A rank's piece of `tensor`, as views that stand side by side along `dim` in the piece."""
        if self.dim is None:
            return [tensor]
        slices = hidden_slices(tensor.shape[self.dim], self.layout, world_size, rank)
        return [tensor.narrow(self.dim, part.start, part.stop - part.start) for part in slices]


def hidden_cuts(experts: Experts, world_size: int, device: torch.device) -> dict[str, HiddenCut]:
    """Name -> how the experts' tensor is cut.

    The sum of what all ranks compute with their pieces is what the whole experts compute: the down projection's bias is
    cut by its own rows, of which each rank adds its part.

    Args:
        experts: whose tensors.
        world_size: ranks that have a piece.
        device: on which an activation that is a function is tried.

    Raises:
        ValueError: for an activation that does not compute hidden units one by one.
    """
    names = experts.expert_parameters().keys()
    layout = _layout_of(experts.activation, "gate_up_proj" in names, experts.hidden_dim, world_size, device)
    cuts = {}
    for name in names:
        is_down = name.startswith("down_proj")
        is_matrix = not is_factor(name) and not name.endswith("_bias")
        if name == "down_proj_bias":
            cuts[name] = HiddenCut(1, pads=True)
        elif name.endswith("_lora_B" if is_down else "_lora_A"):
            cuts[name] = HiddenCut(None)
        else:
            # [E, out, in], of which the up projection has hidden units come out, and the down projection go in.
            dim = 2 if is_down else 1
            cuts[name] = HiddenCut(
                3 - dim if experts.transposed and is_matrix else dim, "single" if is_down else layout
            )
    return cuts


@torch.no_grad()
def _layout_of(
    activation: Activation, is_gated: bool, hidden_dim: int, world_size: int, device: torch.device
) -> HiddenLayout:
    """How the activation's input, [R, 2F] or [R, F], counts hidden units. A function is tried on every piece."""
    layouts: tuple[HiddenLayout, ...] = ("halves", "pairs") if is_gated else ("single",)
    if not callable(activation):
        return layouts[0]
    # Large values as well, on which alone a clamp can be seen.
    width, generator = hidden_dim * (2 if is_gated else 1), torch.Generator().manual_seed(0)
    z_RF = torch.randn(_NUM_ROWS, width, generator=generator, dtype=torch.float32, device="cpu").mul_(8).to(device)
    with torch.autocast(device.type, enabled=False):
        whole_RF = activation(z_RF)
        for layout in layouts:
            if _computes_pieces(activation, z_RF, whole_RF, layout, world_size):
                return layout
    name = getattr(activation, "__qualname__", type(activation).__name__)
    raise ValueError(
        f"the activation {name} does not compute the hidden units of an expert one by one, so that no rank can compute "
        "a part of them. Evaluate with whole experts (evaluate='placed'). (FAQ: sharded-evaluation)"
    )


def _computes_pieces(
    activation: Callable[[Tensor], Tensor], z_RF: Tensor, whole_RF: Tensor, layout: HiddenLayout, world_size: int
) -> bool:
    for rank in range(world_size):
        (wanted,) = hidden_slices(whole_RF.shape[1], "single", world_size, rank)
        parts = [z_RF[:, part] for part in hidden_slices(z_RF.shape[1], layout, world_size, rank)]
        if wanted.start < wanted.stop:
            piece_RF = activation(torch.cat(parts, 1))
            wanted_RF = whole_RF[:, wanted]
            if piece_RF.shape != wanted_RF.shape or not torch.allclose(piece_RF, wanted_RF, rtol=1e-5, atol=1e-6):
                return False
    return True
