"""Evaluation with a part of every expert on each rank: `python examples/sharded_evaluation.py` runs on two CPU ranks.

Trains a model twice, evaluated with whole experts and with sharded ones. Both report the same loss. With sharded ones
the ranks' loads are equal in evaluation, although most tokens choose the same experts.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 32)
        self.moe = sml.MoE(dim=32, hidden_dim=64, num_experts=8, top_k=2)
        self.outer = torch.nn.Linear(32, 1)

    def forward(self, x):
        hidden = self.inner(x)
        return self.outer(hidden + self.moe(hidden))

    def training_step(self, batch, _):
        x, y = batch
        return F.mse_loss(self(x), y) + sml.auxiliary_loss(self)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("val_loss", F.mse_loss(self(x), y), sync_dist=True)

    def on_validation_end(self):
        # Bytes of the experts' weights on this rank: whole experts in slots, or a part of each.
        (layer,) = self.trainer.strategy.engine.layers
        slots = sum(slot.untyped_storage().nbytes() for slot in layer.slots.weights.values())
        pieces = sum(piece.nbytes for piece in layer.slots.pieces.weights.values()) if layer.slots.pieces else 0
        self.weight_bytes = slots + pieces

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data(seed, size):
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(seed))
    # Three quarters of the rows are alike, and choose the same experts.
    x[: 3 * size // 4] = x[0] + 0.1 * x[: 3 * size // 4]
    return DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=32)


if __name__ == "__main__":
    for evaluate in ("placed", "sharded"):
        L.seed_everything(0, verbose=False)
        model = Model()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=sml.SwiftMoEStrategy(evaluate=evaluate),
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data(0, 1024), data(1, 256))
        loss = float(trainer.callback_metrics["val_loss"])
        trainer.print(f"{evaluate}: validation loss {loss:.4f}, {model.weight_bytes / 2**20:.2f} MiB of experts a rank")
