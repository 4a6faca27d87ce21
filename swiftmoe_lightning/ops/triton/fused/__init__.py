"""The fused experts: gather, products, activation and weighting in few kernels, forward and backward."""
