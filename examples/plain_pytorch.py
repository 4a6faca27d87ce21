"""The engine in a plain PyTorch loop, without a framework. On one process the model is a plain MoE:

python examples/plain_pytorch.py
torchrun --nproc-per-node 2 examples/plain_pytorch.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

import swiftmoe_lightning as sml


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 32)
        self.moe = sml.MoE(dim=32, hidden_dim=64, num_experts=8, top_k=2, aux_loss_coef=0.01)
        self.outer = torch.nn.Linear(32, 1)

    def forward(self, x):
        hidden = self.inner(x)
        return self.outer(hidden + self.moe(hidden))


def main():
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = x[:, :1] * x[:, 1:2]

    model = Model()
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(placement="balanced"))
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))

    for epoch in range(5):
        for batch in torch.randperm(512).split(64):
            mine = batch[rank::world_size]
            loss = F.mse_loss(wrapped(x[mine]), y[mine]) + sml.auxiliary_loss(model)
            loss.backward()
            engine.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            print(f"epoch {epoch}: loss {loss:.3f}, slots {engine.placements['moe.experts'].slot_to_expert_S.tolist()}")

    state = engine.full_state_dict()  # on every rank: experts are gathered
    if rank == 0:
        torch.save(state, "plain_pytorch.pt")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
