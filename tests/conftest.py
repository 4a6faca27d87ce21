"""Triton's kernels run under its interpreter, on CPU tensors, unless the environment says `TRITON_INTERPRET=0`.

Triton reads the variable as it decorates a kernel, so it is set before any test imports one.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
