"""A Mixture-of-Experts block in a LightningModule, on two CPU ranks: `python examples/lightning_minimal.py`."""

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml  # also registers strategy="swiftmoe"


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 32)
        self.moe = sml.MoE(dim=32, hidden_dim=64, num_experts=8, top_k=2, aux_loss_coef=0.01)
        self.outer = torch.nn.Linear(32, 1)

    def training_step(self, batch, _):
        x, y = batch
        hidden = self.inner(x)
        loss = F.mse_loss(self.outer(hidden + self.moe(hidden)), y)
        self.log("loss", loss, prog_bar=True)
        return loss + sml.auxiliary_loss(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=64, shuffle=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="swiftmoe",
        max_epochs=4,
        callbacks=[sml.ExpertPopularityMonitor()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Model(), data)
    trainer.print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
