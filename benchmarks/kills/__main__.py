"""Training runs that are killed (SIGKILL) at random moments, also while they save, and go on.

Two gloo ranks train 60 steps in float64 and save after every fourth. One or both are killed, the run is started again,
up to five times, and then left to end. Each of its losses is compared with that of a run which was left alone.

outlived_s          seconds that a rank which was not killed lived on
steps_lost          the most steps that a start lay behind a checkpoint which had been saved: 0 is right
largest_loss_error  absolute difference of a loss, of all steps, also of those that were trained twice

Writes benchmarks/results/NAME.json with every kill and its moment, and prints their sums.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from tests.helpers import run_ranks
from tests.strategies.killed_run import WHERE, draw, num_lost_steps, run_and_kill, train
from tests.strategies.sigterm_runs import losses

KINDS = {"file": False, "directory": True}
KILLS_A_RUN = 5


def kill_runs(folder: Path, kind: str, num_kills: int, seed: int) -> dict[str, Any]:
    """Runs of one kind of checkpoint, each killed a few times and then left to end."""
    moments = random.Random(f"{seed} {kind}")
    whole = folder / f"whole-{kind}"
    run_ranks(train, 2, str(whole), KINDS[kind], init=False)
    expected = dict(losses(whole))
    kills: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    while len(kills) < num_kills:
        run = folder / f"{kind}-{len(runs)}"
        for _ in range(min(KILLS_A_RUN, num_kills - len(kills))):
            kill = draw(moments)
            death = run_and_kill(str(run), KINDS[kind], kill)
            if not death.killed and not death.hung:
                break
            kills.append({**asdict(kill), **asdict(death)})
            print(f"{kind}, kill {len(kills)}: {kill}, {death}", flush=True)
        runs.append(finish(run, kind, expected))
        print(f"{kind}, run {len(runs)}: {runs[-1]}", flush=True)
    return {"kills": kills, "runs": runs}


def finish(run: Path, kind: str, expected: dict[int, float]) -> dict[str, Any]:
    """Let the run end. How its losses, also of steps that were trained twice, differ from the uninterrupted run's."""
    run_ranks(train, 2, str(run), KINDS[kind], init=False)
    trained = losses(run)
    return {
        "steps_trained": len(trained),
        "steps_missing": len(expected.keys() - {number for number, _ in trained}),
        "steps_lost": num_lost_steps(run),
        "largest_loss_error": max(abs(loss - expected[number]) for number, loss in trained),
    }


def print_table(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    columns = [*(f"while {name}" for name in WHERE), "in a save", "hung", "outlived, s"]
    print(f"\n{'checkpoints':12} {'kills':>6} " + " ".join(f"{name:>14}" for name in columns))
    for kind in KINDS:
        kills = results[kind]["kills"]
        counts = Counter(kill["where"] for kill in kills)
        in_save, hung = (sum(kill[name] for kill in kills) for name in ("in_save", "hung"))
        cells = [*(counts[name] for name in WHERE), in_save, hung, round(max(kill["outlived_s"] for kill in kills), 2)]
        print(f"{kind:12} {len(kills):6} " + " ".join(f"{cell:14}" for cell in cells))
    print(f"\n{'checkpoints':12} {'runs':>6} {'steps lost of a whole checkpoint':>33} {'largest error of a loss':>24}")
    for kind in KINDS:
        runs = results[kind]["runs"]
        lost = sum(run["steps_lost"] + run["steps_missing"] for run in runs)
        print(f"{kind:12} {len(runs):6} {lost:33} {max(run['largest_loss_error'] for run in runs):24.1e}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("kills", __doc__)
    parser.add_argument("--kills", type=int, default=50, help="in all, half of them with each kind of checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    if arguments.kills < 2:
        parser.error(f"--kills must be 2 or more, one for each kind of checkpoint, got {arguments.kills}")
    provenance = collect_provenance()
    halves = (arguments.kills - arguments.kills // 2, arguments.kills // 2)
    with TemporaryDirectory() as folder:
        results = {
            kind: kill_runs(Path(folder), kind, half, arguments.seed) for kind, half in zip(KINDS, halves, strict=True)
        }
    print_table(results)
    print(f"written to {write_result(arguments.name, provenance, results)}")


if __name__ == "__main__":
    main()
