"""More experts than fit the devices: parameters and state in the CPU's memory, the weights of three layers at a time.

python examples/big_model.py for one device, or torchrun --nproc-per-node 2 examples/big_model.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml

DIM, LAYERS, STEPS = 64, 6, 40


class Tower(nn.Module):
    """MoE layers one after the other, each recomputed in backward, so that activations are of one layer, too."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(DIM, DIM)
        # No process ever holds a whole expert tensor: each draws its own rows.
        experts = {"num_experts": 16, "top_k": 2, "device": "meta"}
        self.layers = nn.ModuleList([sml.MoE(DIM, 2 * DIM, **experts) for _ in range(LAYERS)])

    def forward(self, x):
        x = self.read(x)
        for layer in self.layers:
            x = x + checkpoint(layer, F.layer_norm(x, (DIM,)), use_reentrant=False)
        return x


def start():
    """Join the processes that torchrun started, or be the only one."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def main():
    device = start()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Tower()
    model.read.to(device)
    config = sml.SwiftMoEConfig(offload_optimizer=True, reshard_after_forward=True)
    engine = sml.SwiftMoEEngine(model, config, device=device)
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True))

    turn = torch.linalg.qr(torch.randn(DIM, DIM)).Q.to(device)
    draws = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        x = torch.randn(256 // world_size, DIM, generator=draws).to(device)
        loss = F.mse_loss(wrapped(x), (x @ turn).relu())
        loss.backward()
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1:2}  loss {float(loss.detach()):.3f}")
    if rank == 0 and device != "cpu":
        print(f"most memory of the device: {torch.cuda.max_memory_allocated() / 1e6:.1f} MB")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
