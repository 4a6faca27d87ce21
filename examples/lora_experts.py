"""LoRA on the experts of a small Qwen3-MoE, configured and saved by PEFT, trained on all processes.

python examples/lora_experts.py, or torchrun --nproc-per-node 2 examples/lora_experts.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import swiftmoe_lightning as sml

TEXT = b"Experts that are wanted most have replicas on more of the processes, and their adapters go with them. " * 8
CONFIG = Qwen3MoeConfig(
    vocab_size=128,
    hidden_size=64,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LORA = LoraConfig(
    r=8,
    lora_alpha=32,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)


def base_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)


def main():
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")

    model = sml.convert(get_peft_model(base_model(), LORA))
    engine = sml.SwiftMoEEngine(model)
    wrapped = engine.data_parallel()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(adapter, lr=1e-2))

    sequences = torch.tensor(list(TEXT))[:768].view(12, 64)
    for step in range(20):
        batch = sequences[rank::world_size]
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 5 == 4:
            print(f"step {step + 1:2}  loss {float(loss.detach()):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        state = engine.full_state_dict()  # on all processes
        if rank == 0:
            model.save_pretrained(folder, state_dict=state)  # an ordinary adapter, which loads without this package
            merged = PeftModel.from_pretrained(base_model(), folder).merge_and_unload()
            print(f"merged: {sum(p.numel() for p in merged.parameters()):,} parameters")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
