"""The MoE layer on one GPU, against other implementations."""
