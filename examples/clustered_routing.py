"""Groups of experts for kinds of sequences: `python examples/clustered_routing.py` runs on two CPU ranks.

Sequences are waves of three frequencies, of which a model predicts the next value. Their first halves are clustered by
k-means before training; the cluster of a sequence names its group of experts, and its tokens choose inside. It prints
which group each kind got, and the loss beside that of a router that chooses among all experts.
"""

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml

LENGTH, KINDS = 32, (0.3, 1.0, 2.5)


def waves(number):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(len(KINDS), (number,), generator=generator)
    phases = 2 * math.pi * torch.rand(number, 1, generator=generator)
    return torch.sin(torch.tensor(KINDS)[kinds, None] * torch.arange(LENGTH + 1) + phases), kinds


def embed(values):
    # Of the first half alone: the second, which is predicted, must not be seen.
    return torch.fft.rfft(values[:, : LENGTH // 2]).abs()


class Model(L.LightningModule):
    def __init__(self, clusters=None):
        super().__init__()
        self.clusters = clusters
        router = None if clusters is None else sml.ClusteredRouter(32, 12, 2, num_groups=len(KINDS))
        self.inner = torch.nn.Linear(2, 32)
        self.moe = sml.MoE(dim=32, hidden_dim=64, num_experts=12, top_k=2, router=router, aux_loss_coef=0.01)
        self.outer = torch.nn.Linear(32, 1)

    def training_step(self, batch, _):
        (values,) = batch
        hidden = self.inner(torch.stack([values[:, 1:-1], values[:, :-2]], dim=-1))
        ids = {} if self.clusters is None else {"cluster_ids": self.clusters(embed(values))}
        out = self.outer(hidden + self.moe(hidden, **ids))
        # Only of what comes after the half that was embedded.
        loss = F.mse_loss(out[:, LENGTH // 2 :, 0], values[:, 2 + LENGTH // 2 :])
        self.log("loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        return loss + sml.auxiliary_loss(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    values, kinds = waves(512)
    clusters = sml.SequenceClusters(len(KINDS), embed(values).shape[1])
    groups = clusters.fit(embed(values))
    for name, known in (("all experts", None), ("groups", clusters)):
        L.seed_everything(0, verbose=False)
        model = Model(known)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="swiftmoe",
            max_epochs=10,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(TensorDataset(values), batch_size=16, shuffle=True))
        trainer.print(f"{name}: loss {float(trainer.callback_metrics['loss']):.5f}")
    if trainer.is_global_zero:
        for kind, frequency in enumerate(KINDS):
            counts = torch.bincount(groups[kinds == kind], minlength=len(KINDS)).tolist()
            print(f"waves of frequency {frequency}: sequences in each group {counts}")
