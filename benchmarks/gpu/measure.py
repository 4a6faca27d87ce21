"""A GPU clock, a budget of seconds, and the times of whole layers, candidate beside candidate.

T tokens, D model dim, E experts, K top-k.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.common.interleaved import seconds_of
from benchmarks.common.spread import spread
from benchmarks.gpu.candidates import Candidate
from benchmarks.gpu.check import TOLERANCE, errors_of, lost_gpu, outputs_and_gradients, reference
from benchmarks.gpu.shapes import Case, Shape, make_case

ROUNDS: Final = 3
# Length of a round, for each candidate and pass.
_ROUND_MS: Final = 60.0
_MOST_IN_A_ROUND: Final = 20
# More than a GPU's L2 holds.
_FLUSHED_BYTES: Final = 2**28
# A candidate with a larger relative error is not timed; others round bfloat16 more often than we do.
_WRONG: Final = 2e-2
_WRONG_OURS: Final = TOLERANCE["bfloat16"]


class Budget:
    """Seconds for the whole run, counted from its making."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left; negative when they are over."""
        return self._end - time.monotonic()


class Clock:
    """Milliseconds on a GPU by its events, with its L2 cache flushed in between; on a CPU, for tests, by the wall.

    Where the GPU is faster than the host launches its kernels (few tokens), the launches are what is measured.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        is_gpu = device != "cpu"
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device) if is_gpu else None

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of each of `count` calls, one after the other."""
        if self._flushed is None:
            return [1e3 * seconds_of(call) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for first, last in events:
            self._flushed.zero_()
            first.record()
            call()
            last.record()
        torch.cuda.synchronize()
        return [first.elapsed_time(last) for first, last in events]

    def count_of(self, call: Callable[[], object]) -> int:
        """How many calls make a round, after two to warm up."""
        slowest = max(self.times(call, 2)[1], 1e-3)
        return int(min(max(_ROUND_MS / slowest, 2), _MOST_IN_A_ROUND)) if self.device != "cpu" else 1

    def spread_of(self, call: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of one call, over all rounds at once."""
        return spread(self.times(call, ROUNDS * self.count_of(call)))


def measure_layer(
    shape: Shape,
    routing: str,
    candidates: dict[str, Candidate],
    clock: Clock,
    budget: Budget,
    begin: Callable[[str], None] = lambda candidate: None,
) -> dict[str, Any]:
    """Candidate -> what was measured, or {"skipped": why}. First all are checked against float64, on the very inputs
    that they are timed with; then they run in turns, so that a GPU that grows warm or slow does so for all.

    Args:
        begin: called with each candidate's name before it runs.
    """
    case = make_case(shape, routing, clock.device, torch.bfloat16)
    results, passes = _check(case, candidates, clock, budget, begin)
    times: dict[tuple[str, str], list[float]] = {}
    counts: dict[tuple[str, str], int] = {}
    # The first round warms up, and finds how many calls make a round.
    for in_round in range(1 + ROUNDS):
        for name, calls in list(passes.items()):
            begin(name)
            try:
                for kind, call in calls.items():
                    if in_round == 0:
                        counts[name, kind] = clock.count_of(call)
                    else:
                        times.setdefault((name, kind), []).extend(clock.times(call, counts[name, kind]))
            except Exception as error:  # for one, out of memory
                results[name] = _failure(error, clock)
                del passes[name]
    flops = {"forward": shape.flops_forward, "forward_backward": 3 * shape.flops_forward}
    for name in passes:
        results[name] |= {f"ms_{kind}": spread(times[name, kind]) for kind in flops}
        medians = {kind: results[name][f"ms_{kind}"]["median"] for kind in flops}
        results[name]["tflops"] = {kind: flops[kind] / medians[kind] / 1e9 for kind in flops}
    return results


def _check(
    case: Case, candidates: dict[str, Candidate], clock: Clock, budget: Budget, begin: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, dict[str, Callable[[], object]]]]:
    """(candidate -> errors and bytes, or why it is skipped; candidate -> its passes, if it is right)."""
    counts_E = torch.bincount(case.ids.flatten(), minlength=case.shape.experts)
    kept = sorted({0, int(counts_E.argmax()), int(counts_E.argmin())})
    expected = reference(case, kept)
    results: dict[str, Any] = {}
    passes: dict[str, dict[str, Callable[[], object]]] = {}
    for name, candidate in candidates.items():
        if (reason := candidate.refuses(case.shape)) is not None:
            results[name] = {"skipped": reason}
            continue
        if budget.left() < 0:
            results[name] = {"skipped": "no time was left"}
            continue
        begin(name)
        try:
            weights = candidate.prepare(case.weights)
            errors = errors_of(outputs_and_gradients(case, candidate.run, weights, candidate.restore), expected, kept)
            # `not all(<=)` rather than `any(>)`: a nan fails it.
            if not all(error <= (_WRONG_OURS if candidate.is_ours else _WRONG) for error in errors.values()):
                results[name] = {"skipped": "wrong", "errors": errors}
                continue
            calls = _passes(case, candidate, weights)
            results[name] = {"errors": errors} | _on_gpu(calls["forward"], calls["forward_backward"], clock)
            passes[name] = calls
        except Exception as error:  # a candidate that does not run here must not stop the others
            results[name] = _failure(error, clock)
        gc.collect()
    return results, passes


def _failure(error: Exception, clock: Clock) -> dict[str, Any]:
    """Why the candidate is skipped. Raises the error if it lost the GPU, on which no later candidate could run."""
    if lost_gpu(clock.device):
        raise error
    return {"skipped": f"{type(error).__name__}: {str(error)[:300]}"}


def _passes(case: Case, candidate: Candidate, weights: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """The forward of training, which keeps what backward needs, and forward with backward. Gradients come out as new
    tensors: nothing is added up, and nothing has to be zeroed."""
    x, scores = case.x.detach().requires_grad_(), case.scores.detach().requires_grad_()
    weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    leaves = [x, scores, *weights.values()]

    def forward() -> Tensor:
        return candidate.run(case.shape, x, case.ids, scores, weights)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, case.grad)

    return {"forward": forward, "forward_backward": forward_backward}


def _on_gpu(forward: Callable[[], object], forward_backward: Callable[[], object], clock: Clock) -> dict[str, Any]:
    """bytes_saved: held from forward to backward, the output included. peak_bytes: the most that forward and backward
    held, all gradients included. Both beside weights and inputs. waits: whether the host waits for the GPU."""
    if clock.device == "cpu":
        return {"bytes_saved": None, "peak_bytes": None, "waits": None}
    # A first call after a compilation may hold memory that later ones do not, and reference cycles keep an earlier
    # call's memory.
    forward_backward()
    gc.collect()
    before = torch.cuda.memory_allocated()
    out = forward()
    saved = torch.cuda.memory_allocated() - before
    del out
    torch.cuda.reset_peak_memory_stats()
    forward_backward()
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward()
        waits = False
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        waits = True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"bytes_saved": saved, "peak_bytes": peak, "waits": waits}
