"""Hugging Face's Trainer, with the experts of a small Qwen3-MoE spread over the processes.

python examples/hf_trainer_minimal.py, or torchrun --nproc-per-node 2 examples/hf_trainer_minimal.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, TrainingArguments

import swiftmoe_lightning as sml

TEXT = """
The router looks at every token and sends it to two of eight experts. Some experts are wanted by many tokens and some by
few, and which they are changes from step to step. So after every step the experts that are wanted most are copied to
more of the processes, and those that are wanted least to fewer. The state of the optimizer stays where it is.
"""
LENGTH = 64


def main():
    data = torch.tensor(list(TEXT.encode())) % 128
    sequences = [data[start : start + LENGTH] for start in range(0, len(data) - LENGTH, 2)]
    dataset = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH,
        output_router_logits=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            # Only where there is no GPU: torchrun's processes then talk by gloo.
            use_cpu=not torch.cuda.is_available(),
            max_steps=40,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

        trainer = sml.SwiftMoETrainer(model, args, train_dataset=dataset[8:], eval_dataset=dataset[:7])

        trainer.train()
        trainer.save_model()  # on all processes: an ordinary checkpoint, which loads without this package
        if trainer.is_world_process_zero():
            AutoModelForCausalLM.from_pretrained(folder)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
