import numpy as np
import pytest

from swiftmoe_lightning.kernels import paths


@pytest.fixture(autouse=True)
def _numpy_overflows_as_a_gpu_does():
    # exp(200) is inf, without a word; the interpreter's numpy would warn.
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=["torch", "triton"])
def path(request):
    """The test runs on torch's reference, and on Triton's kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with paths.forced(request.param):
        yield request.param
