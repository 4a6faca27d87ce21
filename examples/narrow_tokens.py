"""Tokens in fewer bytes between ranks: `python examples/narrow_tokens.py` runs on two CPU ranks.

Trains a model three times: tokens travel as they are (float32 here), in bfloat16, and to their experts in fp8. It
prints the losses, and the bytes that a rank sent.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 64)
        self.moe = sml.MoE(dim=64, hidden_dim=64, num_experts=8, top_k=2, aux_loss_coef=0.01)
        self.outer = torch.nn.Linear(64, 1)

    def training_step(self, batch, _):
        x, y = batch
        hidden = self.inner(x)
        loss = F.mse_loss(self.outer(hidden + self.moe(hidden)), y)
        self.log("loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        return loss + sml.auxiliary_loss(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_train_end(self):
        self.sent = sum(self.trainer.strategy.engine.group.token_bytes.values())


if __name__ == "__main__":
    x = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sin().sum(1, keepdim=True))
    for token_dtype in (None, "bfloat16", "float8_e4m3fn"):
        L.seed_everything(0, verbose=False)
        model = Model()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=sml.SwiftMoEStrategy(token_dtype=token_dtype),
            max_epochs=5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
        loss = float(trainer.callback_metrics["loss"])
        trainer.print(f"token_dtype={token_dtype}: loss {loss:.4f}, {model.sent / 2**20:.2f} MiB of tokens from rank 0")
