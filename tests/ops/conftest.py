import pytest
import torch

from swiftmoe_lightning.ops import backend
from tests.ops.cases import DEVICE


@pytest.fixture(params=["torch", "triton"])
def each_backend(request):
    """The test runs on torch's eager versions, and on Triton's kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
    # Tensors that a test makes are then where the kernels are; a random one says device="cpu", as its generator is.
    with backend.force_backend(request.param), torch.device(DEVICE):
        yield request.param
