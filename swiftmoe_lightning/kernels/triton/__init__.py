"""Triton kernels of the expert layer. Importing anything in here needs triton."""
