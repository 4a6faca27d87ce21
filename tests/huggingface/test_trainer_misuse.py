"""What SwiftMoETrainer refuses, and what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import swiftmoe_lightning as sml
from tests import hf_models
from tests.helpers import run_ranks
from tests.huggingface.test_trainer import trainer

pytest.importorskip("transformers")

MISUSES: list[tuple[dict[str, Any], str]] = [
    ({"fsdp": True}, "cannot be combined with experts spread over processes. Leave it out"),
    (
        {"bf16_full_eval": True},
        "bf16_full_eval=True cannot be combined with experts spread over processes. Evaluate in",
    ),
    (
        {"accelerator_config": {"even_batches": False}},
        "even_batches=False gives processes different numbers of batches",
    ),
    ({"optim": "adafactor"}, "Adafactor looks at whole tensors"),
    ({"family": "dense"}, "convert() found no experts in Linear that it can take over"),
    (
        {"use_cpu": False},
        "2 processes were started, but this Trainer sees 1: each would train alone. Without GPUs make",
    ),
]


def misuse(folder: str) -> list[str]:
    messages = []
    for options, _ in MISUSES:
        try:
            trainer(folder, **options).train()
            messages.append("nothing was raised")
        except Exception as error:
            messages.append(str(error))
    return messages


def test_misuse_is_named_on_every_rank(tmp_path: Path) -> None:
    for messages in run_ranks(misuse, 2, str(tmp_path), init=False):
        for (_, expected), message in zip(MISUSES, messages, strict=True):
            assert expected in message


def test_one_process_for_several_gpus_is_told_to_start_more() -> None:
    from swiftmoe_lightning.huggingface.trainer import check_arguments

    with pytest.raises(ValueError, match="one process was started for 2 GPUs.*torchrun --nproc-per-node 2"):
        check_arguments(SimpleNamespace(n_gpu=2))  # type: ignore[arg-type]


def test_a_checkpoint_of_another_model_is_named_with_its_keys(tmp_path: Path) -> None:
    from swiftmoe_lightning.huggingface.trainer import load_pretrained

    model = hf_models.build("qwen3_moe")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"belongs to another model: .*'missing_keys': \['lm_head.weight'\]"):
        load_pretrained(sml.convert(model), tmp_path)


def test_without_transformers_the_trainer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "swiftmoe_lightning.huggingface.trainer", raising=False)
    with pytest.raises(ImportError, match=re.escape("Install it: pip install 'transformers>=5.13,<6'")):
        _ = sml.SwiftMoETrainer


def test_a_trainer_without_the_methods_that_are_overridden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.delattr(transformers.Trainer, "_wrap_model")
    monkeypatch.delitem(sys.modules, "swiftmoe_lightning.huggingface.trainer", raising=False)
    message = (
        r"transformers \S+ lacks Trainer\._wrap_model\. Install one that has them: pip install 'transformers>=5.13,<6'"
    )
    with pytest.raises(ImportError, match=message):
        _ = sml.SwiftMoETrainer


def test_importing_the_package_does_not_import_the_trainer() -> None:
    code = "import sys, swiftmoe_lightning; print('swiftmoe_lightning.huggingface.trainer' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"


def test_deepspeed_is_refused_over_several_processes() -> None:
    """A stand-in for the arguments, which ask for the package to be installed."""
    from swiftmoe_lightning.huggingface.trainer import check_arguments

    arguments: Any = SimpleNamespace(n_gpu=1, world_size=2, deepspeed="zero3.json")
    with pytest.raises(ValueError, match="deepspeed='zero3.json' cannot be combined with experts spread"):
        check_arguments(arguments)


def test_a_config_is_checked_when_the_trainer_is_made() -> None:
    with pytest.raises(ValueError, match=r"config must be a SwiftMoEConfig, got \{'slots_per_rank': 2\}\. Write"):
        sml.SwiftMoETrainer(hf_models.build("qwen3_moe"), swiftmoe_config={"slots_per_rank": 2})
