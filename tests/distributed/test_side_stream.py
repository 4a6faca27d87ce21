"""Work beside the model's: at once on a CPU, on a stream of its own on a GPU."""

from __future__ import annotations

import pytest
import torch

from swiftmoe_lightning.distributed import side_stream

CPU = torch.device("cpu")


def test_on_a_cpu_work_runs_where_it_is_called() -> None:
    stream, values = side_stream(CPU), torch.ones(3)
    with stream.after_model():
        values += 1
    with stream.beside_model():
        values *= 2
    stream.join((values,))
    assert values.tolist() == [4.0] * 3
    assert stream.to(values, CPU) is values


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_model_waits_for_it_and_the_host_for_what_is_copied_down() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    stream = side_stream(device)
    assert side_stream(device) is stream
    values = torch.zeros(1 << 24, device=device)
    for _ in range(20):
        values += 1
        with stream.after_model():
            values *= 2
        stream.join()
    expected = 2.0 * (2**20 - 1)
    assert torch.equal(values, torch.full_like(values, expected))
    with stream.after_model():
        results = values / 2
        copied = stream.to(results, CPU)
    stream.join((results, copied))
    assert copied.is_pinned()
    assert torch.equal(copied, torch.full_like(copied, expected / 2))
