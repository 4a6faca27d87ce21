import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.ops import dequantize_rows, quantize_rows
from tests.ops.cases import DEVICE, fenced, fenced_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def unpacked(x_RD):
    return dequantize_rows(quantize_rows(x_RD), x_RD.dtype)


@pytest.mark.usefixtures("each_backend")
def test_a_row_is_its_numbers_in_fp8_and_a_power_of_two():
    x_RD = torch.tensor([[448.0, -1.0, 0.0], [449.0, 2.0**-9, -(2.0**-8)], [3.5, 0.25, -0.0]])
    packed = quantize_rows(x_RD)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 7))
    # 448 is 0x7E, the largest; 1 is 0x38; 2^-9 is the least. 449 / 2 is in steps of 16. 3.5 is 448 / 2^7.
    assert packed[:, :3].tolist() == [[0x7E, 0xB8, 0x00], [0x76, 0x00, 0x81], [0x7E, 0x60, 0x80]]
    scales = packed[:, 3:].contiguous().view(torch.float32).flatten()
    assert scales.tolist() == [1.0, 2.0, 2.0**-7]
    assert dequantize_rows(packed, torch.float32).tolist() == [[448, -1, 0], [448, 0, -(2.0**-8)], [3.5, 0.25, 0]]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_stay_so_and_zeros_huge_and_tiny_ones_stay_finite(dtype):
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    rows = [[1, 2, NAN], [INF, 1, 1], [-INF, INF, 1], [0, -0.0, 0], [largest, -largest, 1], [least, -least, 0]]
    x_RD = torch.tensor(rows, dtype=dtype)
    out_RD = unpacked(x_RD)
    assert out_RD[:3].isnan().all()
    # Rounding does not lift the largest number beyond what there is.
    assert torch.equal(out_RD[3:, :2], x_RD[3:, :2])
    # Subnormal numbers of float32 have nowhere to go.
    assert unpacked(torch.full((1, 2), 1e-45, dtype=torch.float32)).tolist() == [[0, 0]]


@pytest.mark.usefixtures("each_backend")
def test_no_rows():
    packed = quantize_rows(torch.empty(0, 5))
    assert packed.shape == (0, 9)
    assert dequantize_rows(packed, torch.bfloat16).shape == (0, 5)


def random_rows(seed, dim, dtype):
    """40 rows of sizes far apart, with numbers of all sizes in each, rounded halfway often, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    span = 9 if dtype == torch.float16 else 100
    size = torch.randint(-span, span, (40, 1), generator=generator) - 20 * torch.rand(40, dim, generator=generator)
    digits = torch.randint(-63, 64, (40, dim), generator=generator)
    return (digits * 2 ** size.clamp(-120, 120).where(digits % 3 > 0, size.round())).to(dtype)


@given(st.integers(0, 10**6), st.integers(1, 70), st.sampled_from([*DTYPES, torch.float64]))
@settings(max_examples=80, deadline=None)
def test_rounding_errs_by_half_a_step_at_most_and_happens_once(seed, dim, dtype):
    x_RD = random_rows(seed, dim, dtype)
    out_RD, largest_R1 = unpacked(x_RD), x_RD.abs().amax(1, keepdim=True)
    assert out_RD.dtype == dtype
    # Half of the last of 4 bits, or half of the least step of the row.
    allowed = torch.maximum(x_RD.abs() * 2.0**-4, largest_R1 * 2.0**-17)
    is_small = x_RD.abs().float() < torch.finfo(torch.float32).smallest_normal
    assert (((out_RD - x_RD).abs() <= allowed) | is_small).all()
    # A relay may pack a row again.
    assert torch.equal(unpacked(out_RD), out_RD)
    # A row's rounding is its own.
    assert torch.equal(unpacked(x_RD[7:8]), out_RD[7:8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 64, 129, 5000])
def test_tritons_bits_are_the_references(dim, dtype):
    pytest.importorskip("triton")
    from swiftmoe_lightning.ops.quantize import eager_dequantize_rows, eager_quantize_rows
    from swiftmoe_lightning.ops.triton import quantize as kernels

    x_RD = random_rows(dim, dim, dtype).to(DEVICE)
    with fenced_memory():
        packed = kernels.quantize_rows(fenced(x_RD))
        out_RD = kernels.dequantize_rows(packed, dtype)
    assert torch.equal(packed, eager_quantize_rows(x_RD))
    assert torch.equal(out_RD, eager_dequantize_rows(packed, dtype))


def test_tritons_bits_are_the_references_of_every_byte():
    pytest.importorskip("triton")
    from swiftmoe_lightning.ops.quantize import eager_dequantize_rows, eager_quantize_rows
    from swiftmoe_lightning.ops.triton import quantize as kernels

    # Every finite number in fp8, halfway between any two, and on both sides of that.
    fp8 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (fp8[1:] + fp8[:-1]) / 2
    x_RD = torch.cat([fp8, middle, middle.nextafter(fp8[1:]), middle.nextafter(fp8[:-1])]).view(1, -1)
    x_RD = torch.cat([x_RD, -x_RD, x_RD * 2.0**-100]).to(DEVICE)
    packed = kernels.quantize_rows(x_RD)
    assert torch.equal(packed, eager_quantize_rows(x_RD))
    assert torch.equal(kernels.dequantize_rows(packed, torch.float32), eager_dequantize_rows(packed, torch.float32))


@pytest.mark.usefixtures("each_backend")
def test_inputs_may_have_any_strides():
    x_RD = torch.randn(6, 4, device="cpu").to(DEVICE).t()
    packed = quantize_rows(x_RD)
    assert torch.equal(packed, quantize_rows(x_RD.contiguous()))
    wide = torch.stack([packed, packed], dim=-1)[..., 0]
    assert torch.equal(dequantize_rows(wide, torch.float32), dequantize_rows(packed, torch.float32))
