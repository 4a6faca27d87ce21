"""Every precision trains as on one process, and the user's plugin stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from torch import Tensor
from torch.optim import Optimizer

import swiftmoe_lightning as sml
from tests.engine import models
from tests.helpers import run_ranks
from tests.strategies.cases import GLOBAL_BATCH, Model, assert_close, assert_same_fit, loader, trainer, whole


class Sgd(Model):
    """No division by tiny second moments: what precision changes stays in proportion."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Cast(Sgd):
    """Takes its batches in the dtype of the module."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (t.to(self.inner.weight.dtype) for t in batch)
        return F.mse_loss(self(x), y)


def test_64_bit_trains_as_on_one_process() -> None:
    assert_same_fit(Cast, 1e-12, precision="64-true")


# A token's expert may change with a score's last bit, so these differ by more than rounding alone would make them.
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_16_bit_trains_as_on_one_process_up_to_rounding(precision: str) -> None:
    assert_same_fit(Cast, 3e-2, precision=precision)


def fit_scaled(world_size: int, strategy: str) -> tuple[dict[str, Tensor], float, str]:
    """float16 under Lightning's own plugin and scaler, with clipping; the scale starts where gradients overflow."""
    model = Sgd()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=100)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    runner = trainer(world_size, strategy, plugins=[plugin], gradient_clip_val=0.5, max_epochs=6)
    runner.fit(model, loader(world_size), loader(world_size, GLOBAL_BATCH))
    assert isinstance(runner.precision_plugin, MixedPrecision)
    assert runner.precision_plugin.scaler is not None
    return whole(model), runner.precision_plugin.scaler.get_scale(), type(runner.precision_plugin.scaler).__name__


def test_16_mixed_scales_and_skips_as_under_ddp() -> None:
    # Not as on one process: float16 gradients of a whole batch overflow where those of its halves do not.
    expected = run_ranks(fit_scaled, 2, 2, "ddp", init=False)
    assert expected[0][1] < 2.0**30
    for (state, scale, name), (ddp_state, ddp_scale, _) in zip(
        run_ranks(fit_scaled, 2, 2, "swiftmoe", init=False), expected, strict=True
    ):
        assert (scale, name) == (ddp_scale, "ShardedGradScaler")
        assert_close(state, ddp_state, 1e-3)


class HalvesGradients(DoublePrecision):
    """A user's plugin whose clipping is its own, with settings and a mutable count."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.num_clips = 0.5, 0

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.num_clips += 1
        for parameter in self.main_params(optimizer):
            assert parameter.grad is not None
            parameter.grad.mul_(self.factor)


def fit_with_own_plugin(world_size: int, strategy: str, make: Callable[[], Precision]) -> dict[str, Tensor]:
    """Whatever the strategy, `plugin` has the same attributes, which are the same objects, at every batch and after."""
    model, plugin = Cast(), make()
    before, kind = dict(vars(plugin)), type(plugin)

    def is_untouched() -> bool:
        now = vars(plugin)
        return type(plugin) is kind and now.keys() == before.keys() and all(now[key] is before[key] for key in now)

    class Watch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert is_untouched() or strategy == "ddp"

    runner = trainer(world_size, strategy, plugins=[plugin], gradient_clip_val=0.5, callbacks=[Watch()])
    for num_epochs in (2, 3):
        runner.fit_loop.max_epochs = num_epochs
        runner.fit(model, loader(world_size), loader(world_size, GLOBAL_BATCH))
        assert is_untouched() or strategy == "ddp"
    assert isinstance(runner.precision_plugin, kind)
    assert type(runner.precision_plugin).__qualname__ == kind.__qualname__
    assert strategy == "ddp" or getattr(runner.precision_plugin, "num_clips", 12) == 12
    return whole(model)


def half_precision() -> Precision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0))


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(HalvesGradients, 1e-9), (Precision, 1e-4), (half_precision, 1e-2)],
    ids=["own clipping", "full", "scaled"],
)
def test_a_users_plugin_clips_by_its_own_rule_and_is_never_written_to(
    make: Callable[[], Precision], tolerance: float
) -> None:
    expected = run_ranks(fit_with_own_plugin, 2, 2, "ddp", make, init=False)
    for state, ddp_state in zip(
        run_ranks(fit_with_own_plugin, 2, 2, "swiftmoe", make, init=False), expected, strict=True
    ):
        assert_close(state, ddp_state, tolerance)


def dtypes(precision: str) -> dict[str, torch.dtype]:
    """Dtypes of parameters, slots, wire and optimizer state after a step."""
    model = Cast()
    runner = trainer(2, precision=precision, max_steps=1, max_epochs=-1)
    runner.fit(model, loader(2), loader(2, GLOBAL_BATCH))
    (layer,) = runner.strategy.engine.layers  # type: ignore[attr-defined]
    state = next(iter(runner.optimizers[0].state.values()))
    return {
        "parameters": model.moe.experts.down_proj.dtype,
        "slots": layer.slots.weights["down_proj"].dtype,
        "state": state["momentum_buffer"].dtype,
    }


def test_mixed_precision_keeps_parameters_in_full_and_true_precision_does_not() -> None:
    full, half = torch.float32, torch.bfloat16
    assert run_ranks(dtypes, 2, "bf16-mixed", init=False)[0] == {"parameters": full, "slots": full, "state": full}
    assert run_ranks(dtypes, 2, "bf16-true", init=False)[0] == {"parameters": half, "slots": half, "state": half}


def train_with_half_slots() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = sml.MoE(8, 16, 4)
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(param_dtype="bfloat16", reduce_dtype="bfloat16"))
    optimizer = engine.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    wrapped = engine.data_parallel()
    with torch.autocast("cpu", torch.bfloat16):
        loss = wrapped(torch.randn(32, 8, generator=torch.Generator().manual_seed(1))).square().mean()
    loss.backward()
    (layer,) = engine.layers
    assert layer.slots.weights["down_proj"].dtype == torch.bfloat16
    assert model.experts.down_proj.dtype == torch.float32
    optimizer.step()
    return engine.full_state_dict()


def test_slots_and_wire_may_be_narrower_than_the_parameters() -> None:
    torch.manual_seed(0)
    model = sml.MoE(8, 16, 4)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(32, 8, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    optimizer.step()
    for state in run_ranks(train_with_half_slots, 2):
        for name, value in model.state_dict().items():
            change, expected = state[name] - start[name], value - start[name]
            assert float((change - expected).norm() / expected.norm()) < 0.05, name


def train_scaled(world_size: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[float]]:
    """Four steps under a loss scaler; in the second one rank's gradient overflows."""
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    module = models.build()
    engine = sml.SwiftMoEEngine(module)
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2))
    scaler = engine.grad_scaler("cpu", init_scale=256.0, growth_interval=2)
    scales = []
    for step in range(4):
        x, target = (models.my_part(t, rank, world_size) for t in models.dense.batch(step, 0, dtype))
        loss = F.mse_loss(model(x), target)
        if step == 1 and rank == world_size - 1:
            # Only the experts of this rank's own tokens see it.
            loss = loss + (model(x) * 1e38).sum() * 1e38
        elif step == 1:
            loss = loss + 0 * model(x).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        engine.clip_grad_norm_(0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return engine.full_state_dict(), scales


def test_all_ranks_skip_the_step_in_which_one_overflowed() -> None:
    ((expected, scales),) = run_ranks(train_scaled, 1, 1, torch.float32)
    assert scales == [256.0, 128.0, 128.0, 256.0]
    for state, found_scales in run_ranks(train_scaled, 2, 2, torch.float32):
        assert found_scales == scales
        assert_close(state, expected)
