"""A Fabric loop whose model's experts are spread over two CPU ranks: `python examples/fabric_minimal.py`."""

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml  # also registers strategy="swiftmoe"


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
    fabric = Fabric(accelerator="cpu", devices=2, strategy="swiftmoe")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    x = torch.randn(512, 16)
    loader = DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2]), batch_size=32, shuffle=True)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)

    for epoch in range(5):
        for i, (features, target) in enumerate(loader):
            accumulates = i % 2 == 0
            with fabric.no_backward_sync(model, enabled=accumulates):
                loss = F.mse_loss(model(features), target) + sml.auxiliary_loss(model)
                fabric.backward(loss / 2)
            if not accumulates:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
        fabric.print(f"epoch {epoch}: loss {fabric.all_reduce(loss.detach()):.3f}")
    # One file with whole experts: strategy="ddp" loads it, too.
    fabric.save("fabric_minimal.ckpt", {"model": model, "optimizer": optimizer})


if __name__ == "__main__":
    main()
