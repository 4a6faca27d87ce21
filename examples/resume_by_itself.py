"""Lose a rank, go on from the last checkpoint; then on one rank alone: `python examples/resume_by_itself.py`."""

import os
import subprocess
import sys
import tempfile
from itertools import islice

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml  # also registers strategy="swiftmoe"


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.moe = sml.MoE(dim=16, hidden_dim=64, num_experts=8, top_k=2)
        self.outer = torch.nn.Linear(16, 1)

    def training_step(self, batch, _):
        x, y = batch
        return F.mse_loss(self.outer(x + self.moe(x)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ResumableLoader(DataLoader):
    """Knows where it stands in the epoch. Lightning saves that, and goes on there; a DataLoader would begin anew."""

    num_given = 0

    def __iter__(self):
        self.num_given %= len(self)
        for batch in islice(super().__iter__(), self.num_given, None):
            self.num_given += 1
            yield batch

    def state_dict(self):
        return {"num_given": self.num_given}

    def load_state_dict(self, state):
        self.num_given = state["num_given"]


class Say(L.Callback):
    def on_train_start(self, trainer, _):
        trainer.print(f"{trainer.world_size} rank(s) go on after step {trainer.global_step}")

    def on_train_batch_end(self, trainer, _, outputs, *__):
        loss = trainer.strategy.reduce(outputs["loss"])  # the mean over ranks
        if trainer.global_step % 5 == 0:
            trainer.print(f"step {trainer.global_step}: loss {loss:.4f}")


class DieOnce(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 18 and trainer.global_rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            print("rank 1 is killed after step 18", flush=True)
            os.kill(os.getpid(), 9)


def train(folder, callbacks, **options):
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    # The global batch stays the same, for any number of ranks.
    data = ResumableLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=64 // devices, shuffle=True)
    callbacks = [*callbacks, ModelCheckpoint(folder, every_n_train_steps=5, save_last=True, save_top_k=0)]
    options |= {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(devices=devices, strategy="swiftmoe", callbacks=callbacks, **options)
    # The newest checkpoint in the folder; where there is none yet, Lightning warns and starts anew.
    trainer.fit(Model(), data, ckpt_path="last")


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        train(sys.argv[1], [Say(), DieOnce()], max_steps=30)
    else:
        # With gloo, ranks that are started again would find those that died in torchrun's store: they need a new one.
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2"]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*torchrun, "--nproc-per-node=2", __file__, folder], check=True, env=environment)
            train(folder, [Say()], max_steps=40)
