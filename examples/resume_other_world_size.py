"""Train on two ranks, go on from the file on one: `python examples/resume_other_world_size.py`.

A checkpoint holds whole experts, whatever the number of ranks that wrote it.
"""

import subprocess
import sys
import tempfile

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
        return F.mse_loss(self.outer(hidden + self.moe(hidden)), y) + sml.auxiliary_loss(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(devices, max_epochs, resume, save):
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    # The global batch stays the same.
    data = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=64 // devices)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="swiftmoe",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), data, ckpt_path=resume)
    trainer.save_checkpoint(save)
    trainer.print(f"{devices} ranks: step {trainer.global_step}, saved {save}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        devices, max_epochs, save, *resume = sys.argv[1:]
        train(int(devices), int(max_epochs), resume[0] if resume else None, save)
    else:
        with tempfile.TemporaryDirectory() as folder:
            # Two runs, each of its own command, as after a change of machines.
            for arguments in (["2", "2", f"{folder}/two.ckpt"], ["1", "4", f"{folder}/one.ckpt", f"{folder}/two.ckpt"]):
                subprocess.run([sys.executable, __file__, *arguments], check=True)
