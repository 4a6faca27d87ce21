"""Experts in groups of ranks: `python examples/expert_groups.py` trains on four CPU ranks, in two groups of two.

On several nodes it is started by expert_groups_torchrun.sh or expert_groups.sbatch.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml


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


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4, help="ranks of a node")
    parser.add_argument("--group-size", type=int, default=2, help="neighbouring ranks that share all experts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = options()
    x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=32, shuffle=True)
    trainer = L.Trainer(
        accelerator=given.accelerator,
        num_nodes=given.num_nodes,
        devices=given.devices,
        strategy=sml.SwiftMoEStrategy(expert_parallel_size=given.group_size),
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Model(), data)
    trainer.print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
