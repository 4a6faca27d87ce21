"""Hugging Face transformers: convert its MoE models, run their experts on our kernels, or train under its Trainer."""

from swiftmoe_lightning.huggingface.convert import convert
from swiftmoe_lightning.huggingface.experts import register_hf_experts

__all__ = ["convert", "register_hf_experts"]
