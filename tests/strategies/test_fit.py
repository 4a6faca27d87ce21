"""Training under the Trainer on ranks equals training on one process, feature by feature."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, WeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml
from tests.helpers import run_ranks
from tests.strategies.cases import DIM, Model, assert_close, assert_same_fit, loader, trainer, whole


class ByName(Model):
    """Two parameter groups by name, SGD with momentum, and a schedule by step."""

    def configure_optimizers(self) -> Any:
        experts = [p for name, p in self.named_parameters() if ".experts." in name]
        rest = [p for name, p in self.named_parameters() if ".experts." not in name]
        groups = [{"params": experts, "lr": 0.2}, {"params": rest, "weight_decay": 0.1}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.2, 0.1], total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByMuon(Model):
    """One optimizer for matrices, experts and the rest, and a schedule that moves learning rates and momentum."""

    def configure_optimizers(self) -> Any:
        groups = sml.muon_groups(self, adamw="outer", lr=1e-2)
        optimizer = sml.Muon(groups, lr=0.05)
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Model):
    """Manual optimization of two optimizers, with clipping and toggling; the experts' steps every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], i: int) -> None:  # type: ignore[override]
        experts, rest = self.optimizers()  # type: ignore[attr-defined]
        with rest.toggle_model():
            self.manual_backward(self.loss(batch))
            self.clip_gradients(rest, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
            rest.step()
            rest.zero_grad()
        step_now = i % 2 == 1
        with experts.toggle_model(sync_grad=step_now):
            self.manual_backward(self.loss(batch) / 2)
            if step_now:
                self.clip_gradients(experts, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
                experts.step()
                experts.zero_grad()

    def configure_optimizers(self) -> Any:
        experts = [p for name, p in self.named_parameters() if ".experts." in name]
        rest = [p for name, p in self.named_parameters() if ".experts." not in name]
        return torch.optim.AdamW(experts, lr=1e-2), torch.optim.SGD(rest, lr=0.1, momentum=0.9)


class Checkpointed(Model):
    """The MoE block is recomputed in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        if not self.training:
            return self.outer(hidden + self.moe(hidden))
        return self.outer(hidden + checkpoint(self.moe, hidden, use_reentrant=self.use_reentrant))


class Frozen(Model):
    """Some or all of the experts' parameters do not train."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.get_parameter(name).requires_grad_(False)


class OnlyExperts(Model):
    """Nothing dense trains, so DDP has nothing to wrap."""

    def __init__(self) -> None:
        super().__init__()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("experts" in name)


class Tied(Model):
    """The same MoE block twice in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        hidden = hidden + self.moe(hidden)
        return self.outer(hidden + self.moe(hidden))


class Bias(Model):
    """Sigmoid router balanced by its bias, a shared expert and biases."""

    def __init__(self) -> None:
        router = sml.TopKRouter(DIM, 5, 2, score="sigmoid", bias_update_rate=0.05)
        super().__init__(router=router, num_shared_experts=1, bias=True, activation="relu2")


class Late(Model):
    """The block comes in configure_model, on whatever device the Trainer builds there."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.moe is None:
            torch.manual_seed(7)
            self.moe = sml.MoE(DIM, 10, 5, 2)


@pytest.mark.parametrize(
    "make",
    [
        Model,
        partial(Model, aux_loss_coef=0.1, z_loss_coef=0.01),
        ByName,
        Manual,
        partial(Checkpointed, use_reentrant=False),
        partial(Checkpointed, use_reentrant=True),
        partial(Frozen, "moe.experts.gate_up_proj"),
        partial(Frozen, "moe.experts.gate_up_proj", "moe.experts.down_proj"),
        OnlyExperts,
        Tied,
        Late,
    ],
    ids=str,
)
def test_modules_train_as_on_one_process(make: Any) -> None:
    assert_same_fit(make)


def test_muon_trains_a_whole_model_as_one_optimizer() -> None:
    # In float64, since a rounding of bfloat16 in Muon goes one way or the other by the last bits of a gradient.
    options = {"precision": "64-true", "accumulate_grad_batches": 2, "gradient_clip_val": 0.2}
    assert_same_fit(ByMuon, 1e-10, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        {"detect_anomaly": True},
    ],
    ids=str,
)
def test_trainer_options_do_as_on_one_process(options: dict[str, Any]) -> None:
    assert_same_fit(Model, **options)


def test_three_ranks_train_as_one_process() -> None:
    assert_same_fit(Model, world_size=3)


def test_the_routers_bias_moves_with_the_popularity_of_all_ranks() -> None:
    # The engine moves it, so one process needs the strategy, too.
    assert_same_fit(Bias, alone="swiftmoe")


class Unfreeze(BaseFinetuning):
    """The experts train from the second epoch on."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.moe.experts)  # type: ignore[arg-type,union-attr]

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.make_trainable(pl_module.moe.experts)  # type: ignore[arg-type,union-attr]


class Thaw(BaseFinetuning):
    """What thaws goes to the optimizer when it does."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.moe.experts)  # type: ignore[arg-type]

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            experts = pl_module.moe.experts  # type: ignore[union-attr]
            self.make_trainable(experts)  # type: ignore[arg-type]
            optimizer.add_param_group({"params": list(experts.parameters()), "lr": 1e-3})  # type: ignore[union-attr]


class TrainsWhatThaws(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit_with(
    make_model: type[L.LightningModule], make_callback: Any, world_size: int, strategy: str
) -> dict[str, Tensor]:
    model = make_model()
    trainer(world_size, strategy, callbacks=[make_callback()]).fit(model, loader(world_size), loader(world_size))
    return whole(model)


class Average(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))


@pytest.mark.parametrize(
    ("make_model", "make_callback"), [(Model, Unfreeze), (TrainsWhatThaws, Thaw), (Model, Average)]
)
def test_callbacks_that_change_the_weights_do_as_on_one_process(make_model: Any, make_callback: Any) -> None:
    (expected,) = run_ranks(fit_with, 1, make_model, make_callback, 1, "auto", init=False)
    for state in run_ranks(fit_with, 2, make_model, make_callback, 2, "swiftmoe", init=False):
        assert_close(state, expected)


class Dense(L.LightningModule):
    """No MoE block at all; a BatchNorm, whose buffers DDP broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.Linear(8, DIM))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit_dense(strategy: str) -> dict[str, Tensor]:
    model = Dense()
    trainer(2, strategy, gradient_clip_val=0.1).fit(model, loader(2))
    return whole(model)


def test_a_module_without_experts_trains_as_under_ddp() -> None:
    for actual, expected in zip(*(run_ranks(fit_dense, 2, s, init=False) for s in ("swiftmoe", "ddp")), strict=True):
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name
