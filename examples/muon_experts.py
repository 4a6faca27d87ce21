"""Muon for experts and hidden matrices, AdamW for the rest, as one optimizer: `python examples/muon_experts.py`.

Two CPU ranks. Each expert's gate, up and down is orthogonalised by itself, on one rank, and updated where its rows are.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml

TEXT = b"An expert's gate, up and down are matrices, and each of them is made orthogonal before it moves the weights. "
LENGTH, DIM = 32, 32


class Model(L.LightningModule):
    """Predicts the next byte from the bytes before it: their running mean, and experts."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(128, DIM)
        self.mix = torch.nn.Linear(2 * DIM, DIM)
        self.moe = sml.MoE(dim=DIM, hidden_dim=64, num_experts=8, top_k=2, aux_loss_coef=0.01)
        self.head = torch.nn.Linear(DIM, 128)

    def training_step(self, batch, _):
        (ids,) = batch
        x = self.embedding(ids[:, :-1])
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        hidden = self.mix(torch.cat((x, mean), dim=-1))
        logits = self.head(hidden + self.moe(hidden))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss + sml.auxiliary_loss(self)

    def configure_optimizers(self):
        # The head is a matrix, but of an output layer: AdamW's, with embeddings, biases and norms.
        groups = sml.muon_groups(self, adamw="head", lr=3e-3)
        for group in groups:
            how = group["experts"] or "dense" if group["use_muon"] else "AdamW"
            self.print(f"{how:<8} {sum(p.numel() for p in group['params']):6,} parameters")
        return sml.Muon(groups, lr=0.02, weight_decay=0.01)


if __name__ == "__main__":
    text = torch.tensor(list(TEXT * 20))
    sequences = text.unfold(0, LENGTH + 1, 1)[:1024]
    data = DataLoader(TensorDataset(sequences), batch_size=16, shuffle=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="swiftmoe",
        max_epochs=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Model(), data)
    trainer.print(f"loss {float(trainer.callback_metrics['loss']):.3f}")
    sent = trainer.strategy.engine.traffic
    trainer.print(f"MB that a rank sent: {', '.join(f'{phase} {sent[phase] / 1e6:.1f}' for phase in sent)}")
