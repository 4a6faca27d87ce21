"""LightningCLI, with the strategy and its options in a YAML file.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --trainer.strategy.slots_per_rank 8

Without arguments it fits with the file beside it.
"""

import sys
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml


class Model(L.LightningModule):
    def __init__(self, num_experts: int = 8, top_k: int = 2, lr: float = 1e-2):
        super().__init__()
        self.lr = lr
        self.inner = torch.nn.Linear(16, 32)
        self.moe = sml.MoE(dim=32, hidden_dim=64, num_experts=num_experts, top_k=top_k, aux_loss_coef=0.01)
        self.outer = torch.nn.Linear(32, 1)

    def training_step(self, batch, _):
        x, y = batch
        hidden = self.inner(x)
        loss = F.mse_loss(self.outer(hidden + self.moe(hidden)), y)
        self.log("loss", loss, prog_bar=True)
        return loss + sml.auxiliary_loss(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Data(L.LightningDataModule):
    def __init__(self, size: int = 1024, batch_size: int = 64):
        super().__init__()
        self.size, self.batch_size = size, batch_size

    def train_dataloader(self):
        x = torch.randn(self.size, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=self.batch_size, shuffle=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        # In sys.argv, which the second process is started with, too.
        sys.argv += ["fit", "--config", str(Path(__file__).with_suffix(".yaml").absolute())]
    LightningCLI(Model, Data, save_config_callback=None)
