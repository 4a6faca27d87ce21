"""A placement policy of one's own, on two CPU ranks: `python examples/custom_policy.py`."""

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml


class TopOfTheStep(sml.PlacementPolicy):
    """Every expert once, and one replica more for each of the most popular, as far as the slots go.

    Every rank asks it alone, so that the same popularity must always give the same placements.
    """

    def place(self, forecast):
        popularity_LE = forecast.popularity_LE
        tables = []
        for popularity_E in popularity_LE:
            num_experts = len(popularity_E)
            by_popularity = np.argsort(-popularity_E, kind="stable")
            replicas = np.resize(by_popularity, self.num_slots - num_experts)
            # Slots of a rank stand side by side: every second one goes to the other rank.
            table = np.concatenate([np.arange(num_experts), replicas])
            tables.append(np.concatenate([table[rank :: self.world_size] for rank in range(self.world_size)]))
        return self.placements_of(tables, popularity_LE.shape[1])


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 32)
        self.moe = sml.MoE(dim=32, hidden_dim=64, num_experts=8, top_k=2)
        self.outer = torch.nn.Linear(32, 1)

    def training_step(self, batch, _):
        x, y = batch
        hidden = self.inner(x)
        return F.mse_loss(self.outer(hidden + self.moe(hidden)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class PrintReplicas(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        for name, placement in trainer.strategy.engine.placements.items():
            replicas = np.bincount(placement.slot_to_expert_S, minlength=placement.num_experts)
            trainer.print(f"epoch {trainer.current_epoch}, {name}: replicas {replicas.tolist()}")


if __name__ == "__main__":
    x = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=64, shuffle=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sml.SwiftMoEStrategy(slots_per_rank=6, placement=TopOfTheStep),
        max_epochs=3,
        callbacks=[PrintReplicas()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Model(), data)
