"""Expert parallelism of transformers: ours against its own, step time and memory."""
