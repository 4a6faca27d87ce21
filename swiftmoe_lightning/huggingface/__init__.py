"""Hugging Face transformers: its MoE models' experts become ours, or run on our kernels. `trainer` has the Trainer."""

from swiftmoe_lightning.huggingface.convert import convert
from swiftmoe_lightning.huggingface.experts import register_hf_experts

__all__ = ["convert", "register_hf_experts"]
