"""An Accelerate loop whose model's experts are spread over the processes.

torchrun --nproc-per-node 2 examples/accelerate_minimal.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

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
    # cpu=True only where there is no GPU: torchrun's processes then talk by gloo.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    loader = DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2]), batch_size=32, shuffle=True)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer, loader = sml.accelerate.prepare(accelerator, model, optimizer, loader)

    for epoch in range(5):
        for features, target in loader:
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(features), target) + sml.auxiliary_loss(model)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {accelerator.reduce(loss.detach(), 'mean'):.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
