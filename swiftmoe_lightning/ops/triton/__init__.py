"""The Triton kernels of the operations (see `ops/common.py`). Only these files import triton at module level.

In a kernel, `p_` is a pointer, `b_` a block of values, `m_` a mask; a comment gives the shape behind each pointer.
Row offsets are int64 (R * D may pass 2**31), sums are float32, and no float is ever added atomically.
"""
