"""Scripts as users start them: popen, torchrun, LightningCLI by name and by class path; and what cannot be started."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import swiftmoe_lightning as sml
from swiftmoe_lightning.strategies import registration
from tests.helpers import rank_errors, run_script, script_environment
from tests.strategies.cases import Model, loader, trainer

SCRIPT = """
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader
import swiftmoe_lightning as sml

class Model(L.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.moe = sml.MoE(width, 16, 4)
    def training_step(self, batch, _):
        return self.moe(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.randn(32, 8), batch_size=4)

class Report(L.Callback):
    def on_train_end(self, trainer, module):
        engine = trainer.strategy.engine
        text = f"rank {trainer.global_rank} of {trainer.world_size}, {len(engine.layers)} layers, "
        text += f"{trainer.global_step} steps, {type(module.moe.experts.down_proj.data).__name__}"
        open(f"report-{trainer.global_rank}", "w").write(text)

options = dict(accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False)
"""

FIT = (
    SCRIPT
    + """
if __name__ == "__main__":
    L.Trainer(strategy="swiftmoe", callbacks=[Report()], **options).fit(Model(), Data())
"""
)

CLI = (
    SCRIPT
    + """
from lightning.pytorch.cli import LightningCLI
if __name__ == "__main__":
    LightningCLI(Model, Data, trainer_defaults={**options, "callbacks": [Report()]}, save_config_callback=None)
"""
)

CLASS_PATH = "swiftmoe_lightning.SwiftMoEStrategy"


def start(folder: Path, source: str, *command: str) -> None:
    (folder / "script.py").write_text(source)
    run_script(sys.executable, *command, cwd=folder)
    for rank in range(2):
        expected = f"rank {rank} of 2, 1 layers, 4 steps, DTensor"
        assert (folder / f"report-{rank}").read_text() == expected


def test_a_script_starts_its_own_processes(tmp_path: Path) -> None:
    start(tmp_path, FIT, "script.py")


ENDLESS = (
    SCRIPT
    + """
class Started(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            open(f"started-{trainer.global_rank}", "w").close()
    def on_exception(self, trainer, module, error):
        open(f"stopped-{trainer.global_rank}", "w").write(f"{type(error).__name__} {trainer.global_step}")

if __name__ == "__main__":
    L.Trainer(strategy="swiftmoe", callbacks=[Started()], **{**options, "max_epochs": -1}).fit(Model(), Data())
"""
)


def test_sigterm_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=script_environment(), stderr=subprocess.DEVNULL
    )
    try:
        while not (tmp_path / "started-1").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
    stopped = [(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)]
    assert stopped[0].startswith("SIGTERMException ")
    assert stopped[1] == stopped[0]


def test_torchrun_starts_the_script(tmp_path: Path) -> None:
    start(tmp_path, FIT, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py")


def test_accelerate_launch_starts_the_script(tmp_path: Path) -> None:
    """Without GPUs it starts one process, and Lightning the others."""
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_cpu_threads_per_process", "1")
    start(tmp_path, FIT, *launch, "script.py")


def test_lightning_cli_takes_the_strategy_by_name(tmp_path: Path) -> None:
    start(tmp_path, CLI, "script.py", "fit", "--trainer.strategy=swiftmoe")


def test_lightning_cli_takes_the_strategy_by_class_path_without_an_import_and_its_options(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"""trainer:
  strategy:
    class_path: {CLASS_PATH}
    init_args: {{slots_per_rank: 3, placement: symi, replace_every: 2, reduce_dtype: bfloat16}}
"""
    )
    check = "\n        assert module.trainer.strategy.config.slots_per_rank == 3\n        engine = trainer"
    source = CLI.replace("\n        engine = trainer", check)
    start(tmp_path, source, "script.py", "fit", "--config", "config.yaml")


def test_a_trainer_of_pytorch_lightning_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    other = pytest.importorskip("pytorch_lightning")
    registration.register()
    with pytest.raises(TypeError, match="Write `import lightning as L` and use L.Trainer and L.LightningModule"):
        other.Trainer(strategy="swiftmoe", accelerator="cpu", devices=1, logger=False)


def test_a_trainer_takes_the_strategy_by_name_in_any_case() -> None:
    for name in ("swiftmoe", "SwiftMoE"):
        runner = L.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False, enable_checkpointing=False)
        assert isinstance(runner.strategy, sml.SwiftMoEStrategy)


def test_the_engine_is_there_only_once_a_module_runs() -> None:
    with pytest.raises(RuntimeError, match="call trainer.fit first"):
        _ = sml.SwiftMoEStrategy().engine


def too_few_slots() -> None:
    trainer(2, sml.SwiftMoEStrategy(slots_per_rank=2)).fit(Model(), loader(2), loader(2))


def test_too_few_slots_are_an_error_on_every_rank() -> None:
    for error in rank_errors(too_few_slots, 2, init=False):
        assert "2 ranks x 2 slots = 4 slots cannot hold 5 experts" in error
        assert "Set slots_per_rank to 3 or more" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_rank": 0}, "slots_per_rank must be a whole number of 1 or more, got 0"),
        ({"replace_every": 0}, "replace_every must be a whole number of 1 or more, got 0"),
        ({"placement": "best"}, "placement must be one of .*'packed'.*, got 'best'"),
        ({"token_split": "x"}, "token_split must be one of .*, got 'x'"),
        ({"exchange": "x"}, "exchange must be one of .*, got 'x'"),
        ({"reduce_dtype": "int8"}, "reduce_dtype must be one of .*, got 'int8'"),
        ({"param_dtype": "half"}, "param_dtype must be one of .*, got 'half'"),
        ({"token_dtype": "float8"}, "token_dtype must be one of .*, got 'float8'"),
    ],
)
def test_settings_out_of_range_are_refused_where_they_are_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sml.SwiftMoEStrategy(**options)


class Optimizer(Model):
    def __init__(self, make: Any) -> None:
        super().__init__(bias=True)
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Factored(torch.optim.Optimizer):
    """An optimizer that nobody has heard of, which scales by whole-tensor norms."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / p.grad.norm())
        return loss


def adafactor(parameters: Any) -> Any:
    return torch.optim.Adafactor(parameters, lr=1e-2)


def muon(parameters: Any) -> Any:
    # Weights of experts are 3-D, which Muon refuses by itself; their biases are matrices to it.
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=1e-2)


def lbfgs(parameters: Any) -> Any:
    return torch.optim.LBFGS(parameters)


def fit_optimizer(make: Any) -> None:
    trainer(2).fit(Optimizer(make), loader(2), loader(2))


ELEMENTWISE = (
    "Use an elementwise optimizer (SGD, Adam, AdamW, RMSprop, Adagrad, ...) for parameters cut over the ranks, or"
)


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (adafactor, [ELEMENTWISE, "looks at whole tensors (sums of its rows and columns), and each rank holds only"]),
        (muon, ["sml.Muon(sml.muon_groups(model)) updates experts and dense matrices that are cut, and the rest by"]),
        (lbfgs, [ELEMENTWISE]),
        (Factored, [ELEMENTWISE, "looks at whole tensors (norms, factors or orthogonalisation), and each rank"]),
    ],
)
def test_optimizers_that_look_at_whole_tensors_are_refused_on_every_rank(make: Any, messages: list[str]) -> None:
    for error in rank_errors(fit_optimizer, 2, make, init=False):
        assert all(message in error for message in messages), error
