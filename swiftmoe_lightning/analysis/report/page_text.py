"""The page's sentences and tables, as HTML. Text from the data is escaped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Final

from swiftmoe_lightning.analysis.report.page_data import PageData, PolicySeries
from swiftmoe_lightning.analysis.report.page_numbers import dropped_share
from swiftmoe_lightning.placement import imbalance

_SENT: Final = ("gradients", "weights", "paper's way", "state moved")
LOSS_TERMS: Final = {
    "split": "The tokens could have been shared better over the same replicas.",
    "placement": "The same replicas on other ranks would have done better.",
    "prediction": "Replicas follow the popularity that was expected, not the one that came.",
    "floor": "Every expert keeps a replica, however cold it is.",
    "rounding": "Numbers of replicas are whole.",
}


def summary(data: PageData) -> str:
    """The result in one plain sentence, best policy first; not escaped."""
    num_steps, num_layers, num_experts = data.counts_ULE.shape
    size = f"{many(num_steps, 'step')}, {many(num_layers, 'layer')}, {many(num_experts, 'expert')}"
    if not data.policies:
        return f"Popularity over {size}."
    if data.capacity_factor is None:
        ranked = sorted((mean_imbalance(policy), policy.name) for policy in data.policies)
        # The first policy's part also says what the number means.
        first = f"The busiest rank's load is {ranked[0][0]:.2f} x the mean with {ranked[0][1]}"
        rest = [f"{value:.2f} x with {name}" for value, name in ranked[1:]]
    else:
        ranked = sorted((dropped(policy, data), policy.name) for policy in data.policies)
        first = f"{ranked[0][1]} drops {_percent(ranked[0][0])} of assignments"
        rest = [f"{name} {_percent(value)}" for value, name in ranked[1:]]
    return f"{'; '.join([first, ', '.join(rest)] if rest else [first])} ({size})."


def dropped(policy: PolicySeries, data: PageData) -> float:
    """Assignments over capacity over all, all steps and layers."""
    return float(dropped_share(policy.dropped_UL.sum(), data.counts_ULE.sum()))


def mean_imbalance(policy: PolicySeries) -> float:
    """Load of the busiest rank over the mean rank's, mean of all steps and layers."""
    return float(imbalance(policy.load_ULW).mean())


def policy_table(data: PageData) -> str:
    """The HTML table of each policy's drops, imbalance and bytes; without policies, a sentence."""
    if not data.policies:
        return "<p>No policy was compared.</p>"
    sent = _SENT if _counts_bytes(data) else ()
    head = (
        '<thead><tr><th rowspan="2" scope="col">policy</th><th colspan="2" scope="colgroup">assignments, %</th>'
        '<th colspan="2" scope="colgroup">imbalance</th>'
        + ('<th colspan="4" scope="colgroup">bytes a step</th>' if sent else "")
        + '<th rowspan="2" scope="col">replicas moved a step</th></tr>'
        + _row("th", "dropped", "survived", "mean", "max", *sent)
        + "</thead>"
    )
    rows = "".join(_policy_row(index, policy, data) for index, policy in enumerate(data.policies))
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def _policy_row(index: int, policy: PolicySeries, data: PageData) -> str:
    share = dropped(policy, data)
    numbers = [f"{100 * share:.2f}", f"{100 * (1 - share):.2f}"]
    numbers += [f"{mean_imbalance(policy):.3f}", f"{imbalance(policy.load_ULW).max():.2f}"]
    if _counts_bytes(data):
        numbers += ["–" if value is None else bytes_text(value) for value in policy.sent]
    numbers.append(f"{policy.moved_UL.sum(1).mean():.1f}")
    name = f'<th scope="row" data-policy="{index}">{escape(policy.name)}<small>{escape(policy.label)}</small></th>'
    return f"<tr>{name}{_cells('td', numbers)}</tr>"


def _counts_bytes(data: PageData) -> bool:
    """Whether any policy's bytes are known. A run's own are not recorded."""
    return any(value is not None for policy in data.policies for value in policy.sent)


def loss_terms(data: PageData) -> list[str]:
    """The causes of all policies' losses: those of `Bounds` in its order, then others by name."""
    terms = {term for policy in data.policies for term in policy.losses}
    return [term for term in LOSS_TERMS if term in terms] + sorted(terms - LOSS_TERMS.keys())


def loss_table(data: PageData) -> str:
    """The HTML table of each policy's losses by cause; where no losses are known, a sentence."""
    terms = loss_terms(data)
    policies = [policy for policy in data.policies if policy.losses]
    if not terms:
        return "<p>Not computed for these policies.</p>"
    head = _row("th", "lost to", *[policy.name for policy in policies], "because")
    rows = ""
    for index, term in enumerate(terms):
        values = [f"{100 * policy.losses.get(term, 0.0):.2f} %" for policy in policies]
        name = f'<th scope="row" data-loss="{index}">{escape(term)}</th>'
        rows += f'<tr>{name}{_cells("td", values)}<td class="words">{escape(LOSS_TERMS.get(term, ""))}</td></tr>'
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def notes(data: PageData) -> str:
    """Definitions of the table's terms, with this run's capacity."""
    if not data.policies:
        return ""
    capacity = "Nothing is dropped: no capacity is set. "
    if data.capacity_factor is not None:
        capacity = f"Dropped: assignments over capacity, factor {data.capacity_factor:g}. "
    sent = ""
    if _counts_bytes(data):
        sent = (
            "Gradients, weights: what the two weight phases send, all ranks together. Paper's way: both, sent as the "
            "paper sends them. State moved: optimizer state that follows moved replicas. "
        )
    return escape(
        f"{capacity}Imbalance: load of the busiest rank over the mean rank's, after drops; 1 is perfect. {sent}"
        "Moved: experts new on a rank, all layers."
    )


def path_text(path: Path) -> str:
    """A path for people: its name may hold bytes that are not Unicode, which must not fail a command that is done."""
    return os.fsencode(path).decode(errors="replace")


def bytes_text(value: float) -> str:
    """Bytes in the unit that fits, "B" to "TB", by powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def seconds_text(value: float) -> str:
    """Seconds in the unit that fits, "us" to "s"."""
    for unit, scale in (("us", 1e6), ("ms", 1e3), ("s", 1)):
        if scale * value < 999.5:
            return f"{scale * value:.3g} {unit}"
    return f"{value:,.0f} s"


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def many(number: int, thing: str) -> str:
    """A number and its noun: "1 step", "1,000 steps".

    Args:
        number: how many.
        thing: of what, in the singular; its plural ends in s.
    """
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _row(tag: str, *cells: str) -> str:
    return f"<tr>{_cells(f'{tag} scope=col' if tag == 'th' else tag, cells)}</tr>"


def _cells(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag.split()[0]}>" for cell in cells)
