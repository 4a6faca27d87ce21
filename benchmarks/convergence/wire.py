"""Loss with narrower tokens on the wire: `python -m benchmarks.convergence.wire [--steps 200] [--seeds 3]`.

Trains a small GPT, top-2 of 16 experts and dropless, on the text of the demo, in float32 on 2 gloo ranks: with tokens
that travel in float32, in bfloat16 and in fp8 (`token_dtype`), from each seed with the same weights and data. "float32,
again" is the control: the same with another placement, which differs by the order of float32's sums alone. Validation
is with the run's own wire.

Prints for each the validation loss after the last step (nats a byte), how far it is from float32's of the same seed
(mean over seeds, least and most), the same of the training loss over the last quarter of the steps, and the bytes of
tokens over float32's. Writes benchmarks/results/NAME.json: also every run's losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.common.across_ranks import total
from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.convergence.corpus import Corpus
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.training import batches, make_model, make_optimizer, stack, validate
from swiftmoe_lightning import SwiftMoEConfig, SwiftMoEEngine
from swiftmoe_lightning.demo.gpt import next_byte_loss
from swiftmoe_lightning.demo.text import read_texts, split_texts
from tests.helpers import run_ranks

# What differs -> settings of the run.
WIRES: Final[dict[str, dict[str, str]]] = {
    "float32": {},
    "float32, again": {"placement": "static"},
    "bfloat16": {"token_dtype": "bfloat16"},
    "fp8": {"token_dtype": "float8_e4m3fn"},
}
SETTING: Final = Setting(
    corpus="shakespeare",
    num_ranks=2,
    slots_per_rank=10,
    top_k=2,
    capacity_factor=None,
    aux_loss_coef=0.0,
    num_layers=2,
    hidden_dim=128,
    sequences_per_rank=8,
    num_steps=200,
    warm_up=20,
    validate_every=50,
)
Run = dict[str, Any]


def train(wire: str, seed: int, setting: Setting, corpus: Corpus) -> Run:
    """One run on the ranks of the default process group, JSON-able: its losses by step, and bytes of tokens."""
    torch.manual_seed(seed)
    model = make_model(setting)
    engine = SwiftMoEEngine(model, SwiftMoEConfig(slots_per_rank=setting.slots_per_rank, **WIRES[wire]))
    wrapped = engine.data_parallel()
    optimizer, schedule = make_optimizer(model, setting)
    engine.prepare_optimizer(optimizer)
    sequences, losses, validated = batches(corpus, setting, seed), [], []
    for step in range(setting.num_steps):
        first = step * setting.num_sequences + dist.get_rank() * setting.sequences_per_rank
        loss = next_byte_loss(wrapped, stack(sequences, first, first + setting.sequences_per_rank))
        loss.backward()
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % setting.validate_every == 0:
            validated.append(validate(model, corpus, setting))
    assert engine.group is not None
    sent = sum(total([float(sum(engine.group.token_bytes.values()))]))
    losses = [loss / setting.num_ranks for loss in total(losses)]
    return {"wire": wire, "seed": seed, "train_loss": losses, "validation_loss": validated, "token_bytes": sent}


def train_all(seeds: int, setting: Setting, corpus: Corpus) -> list[Run]:
    """Every wire from every seed, on each rank."""
    runs = []
    for seed in range(seeds):
        for wire in WIRES:
            runs.append(train(wire, seed, setting, corpus))
            if dist.get_rank() == 0:
                print(f"{wire}, seed {seed}: {runs[-1]['validation_loss'][-1]:.4f}", flush=True)
    return runs


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Wire -> figures over its seeds, JSON-able.

    Args:
        runs: of all wires and seeds.
    """
    by_seed = {(run["wire"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs})

    def differences(wire: str, loss: Any) -> list[float]:
        return [loss(by_seed[wire, seed]) - loss(by_seed["float32", seed]) for seed in seeds]

    rows = {}
    for wire in dict.fromkeys(run["wire"] for run in runs):
        validated, trained = differences(wire, _final), differences(wire, _last_quarter)
        rows[wire] = {
            "validation_loss": mean(_final(by_seed[wire, seed]) for seed in seeds),
            "difference": mean(validated),
            "least": min(validated),
            "most": max(validated),
            "train_difference": mean(trained),
            "train_least": min(trained),
            "train_most": max(trained),
            "token_bytes": by_seed[wire, seeds[0]]["token_bytes"] / by_seed["float32", seeds[0]]["token_bytes"],
        }
    return rows


def _final(run: Run) -> float:
    return float(run["validation_loss"][-1])


def _last_quarter(run: Run) -> float:
    losses = run["train_loss"]
    return mean(losses[-(-3 * len(losses) // 4) :])


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """The summary, in Markdown."""
    print("| tokens travel in | validation loss | minus float32's | training loss minus float32's | bytes |")
    print("|---|---|---|---|---|")
    for wire, row in rows.items():
        validated = f"{row['difference']:+.4f} ({row['least']:+.4f} to {row['most']:+.4f})"
        trained = f"{row['train_difference']:+.4f} ({row['train_least']:+.4f} to {row['train_most']:+.4f})"
        print(f"| {wire} | {row['validation_loss']:.4f} | {validated} | {trained} | {row['token_bytes']:.3f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("convergence.wire", __doc__)
    parser.add_argument("--steps", type=int, default=SETTING.num_steps, help="of each run; a multiple of 50")
    parser.add_argument("--seeds", type=int, default=3, help="of each wire")
    options = parser.parse_args(arguments)
    setting, provenance = replace(SETTING, num_steps=options.steps), collect_provenance()
    corpus = Corpus(*split_texts(read_texts(None), setting.seq_len))
    runs = run_ranks(train_all, setting.num_ranks, options.seeds, setting, corpus, timeout_s=3600)[0]
    rows = summary(runs)
    print_table(rows)
    print(write_result(options.name, provenance, {"setting": asdict(setting), "wires": rows, "runs": runs}))


if __name__ == "__main__":
    # By its name: ranks do not import `__main__`.
    from benchmarks.convergence import wire

    wire.main()
