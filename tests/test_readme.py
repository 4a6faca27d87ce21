"""The README's Python is run, and its commands and links are there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swiftmoe_lightning.placement import Forecast
from tests import hf_models, works_with
from tests.helpers import run_script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/training-step.md",
    "docs/placement.md",
    "docs/scale.md",
    "docs/transformers.md",
    "docs/parallel-axes.md",
    "docs/checkpoints.md",
    "docs/stopping-and-resuming.md",
    "docs/guides/notebooks.md",
    "docs/guides/watching.md",
    "benchmarks/README.md",
]


FIT = """
if __name__ == "__main__":
    from torch.utils.data import DataLoader, TensorDataset

    trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(64, 16), torch.randn(64, 1)), batch_size=8))
    assert trainer.world_size == 2 and trainer.global_step == 4
"""


def test_the_lightning_example_trains(tmp_path: Path) -> None:
    on_cpu = BLOCKS[0].replace('accelerator="auto"', 'accelerator="cpu", max_epochs=1, logger=False')
    assert on_cpu != BLOCKS[0]
    (tmp_path / "script.py").write_text(on_cpu + FIT)
    run_script(sys.executable, "script.py", cwd=tmp_path)


def test_the_tensor_parallel_example_trains(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/parallel-axes.md").read_text(), flags=re.DOTALL)
    trainer = 'trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_epochs=1, logger=False)\n'
    (tmp_path / "script.py").write_text(block + trainer + FIT.replace("== 4", "== 8"))
    run_script(sys.executable, "script.py", cwd=tmp_path)


def test_the_plain_loop_runs() -> None:
    import swiftmoe_lightning as sml

    model = sml.MoE(8, 8, 4)
    names = {"sml": sml, "torch": torch, "model": model}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    names["wrapped"](torch.randn(3, 8)).sum().backward()  # type: ignore[operator]
    names["optimizer"].step()  # type: ignore[attr-defined]


def test_the_hugging_face_block_converts_and_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import swiftmoe_lightning as sml

    hf_models.build("olmoe").save_pretrained(tmp_path / "model")
    code = BLOCKS[2].replace("allenai/OLMoE-1B-7B-0924", str(tmp_path / "model"))
    code = code.replace('"trained"', repr(str(tmp_path / "trained")))
    names: dict[str, Any] = {"sml": sml}
    exec(compile(code, "README.md", "exec"), names)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    ids = hf_models.tokens(0)
    torch.testing.assert_close(loaded(input_ids=ids).logits, names["model"](input_ids=ids).logits)


def test_the_policy_in_the_docs_places_the_hottest_expert_on_every_rank() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/placement.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "placement.md", "exec"), names)
    (placement,) = names["HotExpertEverywhere"](4, 3).place(Forecast.of(np.array([[3, 9, 1, 0, 2]])))
    assert names["strategy"].config.placement is names["HotExpertEverywhere"]
    assert all(1 in placement.experts_of(rank) for rank in range(4))


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    assert set(commands) <= set(targets)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target.read_text()), link


def anchors_of(page: str) -> set[str]:
    """What a link can name on a Markdown page: its headings, as GitHub and the site write them."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_table_of_what_works_is_that_of_the_tests() -> None:
    assert works_with.with_table(README) == README, "run python -m tests.works_with"


def test_a_claim_that_no_test_proves_is_refused() -> None:
    with pytest.raises(ValueError, match="no test in tests/test_readme.py is about 'teleportation'"):
        works_with.path_of("test_readme: claim teleportation")
