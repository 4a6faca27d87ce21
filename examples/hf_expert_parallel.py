"""A model that transformers itself distributes, with ep_implementation="swiftmoe" for its expert parallelism.

python examples/hf_expert_parallel.py makes a small model in a temporary folder and starts 2 processes; or torchrun
--nproc-per-node 4 examples/hf_expert_parallel.py FOLDER, with a folder in which `save_small_model` has made it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, TrainingArguments
from transformers.distributed import DistributedConfig

import swiftmoe_lightning as sml

TEXT = """
The router looks at every token and sends it to two of seven experts. Some experts are wanted by many tokens and some by
few, and which they are changes from step to step. So after every step the experts that are wanted most are copied to
more of the processes, and those that are wanted least to fewer. The state of the optimizer stays where it is.
"""
LENGTH = 64


def save_small_model(folder):
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=7,  # transformers' own implementations need a number that ep_size divides
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")


def main(folder):
    data = torch.tensor(list(TEXT.encode())) % 128
    sequences = [data[start : start + LENGTH] for start in range(0, len(data) - LENGTH, 2)]
    dataset = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
    args = TrainingArguments(
        folder / "run",
        use_cpu=not torch.cuda.is_available(),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=10,
        save_steps=10,
        report_to=[],
        disable_tqdm=True,
    )

    num_ranks = int(os.environ["WORLD_SIZE"])
    distributed_config = DistributedConfig(fsdp_size=num_ranks, ep_size=2, ep_implementation="swiftmoe")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=distributed_config)
    # transformers.Trainer trains it, too, but can neither write its optimizer nor resume.
    trainer = sml.SwiftMoETrainer(model, args, train_dataset=dataset)
    trainer.train()

    again = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=distributed_config)
    trainer = sml.SwiftMoETrainer(again, args, train_dataset=dataset)
    # On any number of ranks, at any ep_size.
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-10"))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_small_model(Path(folder))
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            subprocess.run([*torchrun, __file__, folder], check=True)
