import pytest
import torch
import torch.nn.functional as F

from swiftmoe_lightning.ops import ACTIVATIONS, activate
from tests.ops.cases import assert_close, assert_triton_equals_eager, gradients


def by_autograd(z_RF, activation):
    if activation == "swiglu":
        gate_RF, up_RF = z_RF.chunk(2, dim=-1)
        return F.silu(gate_RF) * up_RF
    return F.gelu(z_RF) if activation == "gelu" else F.relu(z_RF).square()


def values(num_rows, width, dtype=torch.float32):
    return (2 * torch.randn(num_rows, width, generator=torch.Generator().manual_seed(5))).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_eager_version_equals_torchs_functions(activation):
    z_RF = values(9, 6, torch.float64).requires_grad_()
    actual, expected = activate(z_RF, activation), by_autograd(z_RF, activation)
    assert_close(actual, expected)
    assert_close(gradients(actual, {"z": z_RF})["z"], gradients(expected, {"z": z_RF})["z"])
    assert torch.autograd.gradcheck(lambda z: activate(z, activation), z_RF)


# R rows, F hidden dim; more than one column block in the last.
@pytest.mark.parametrize("sizes", [(0, 4), (1, 1), (7, 33), (40, 64), (3, 1030)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tritons_activations_equal_the_eager_ones(sizes, dtype, activation):
    num_rows, dim = sizes
    z_RF = values(num_rows, 2 * dim if activation == "swiglu" else dim, dtype)
    assert_triton_equals_eager(activate, {"z": z_RF}, activation)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_and_poison_stay_in_their_place(activation):
    z_RF = torch.tensor([[-200.0, 1.0], [60.0, 1.0], [float("nan"), 1.0], [0.5, 1.0]], requires_grad=True)
    out_RF = activate(z_RF, activation)
    out_RF.sum().backward()
    finite = torch.tensor([0, 1, 3])
    assert out_RF[finite].isfinite().all()
    assert z_RF.grad[finite].isfinite().all()
    assert out_RF[2, 0].isnan()
    assert z_RF.grad[2, 0].isnan()
    assert_close(out_RF[finite], by_autograd(z_RF[finite], activation))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be one of .*swiglu.* got 'relu'"):
        activate(torch.ones(1, 2), "relu")
