"""The demo's result as a table: what each line of runs knows after each stage, and what it forgot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from megacpt.report.lineage import chain, with_ancestors
from megacpt.report.outcome import Outcome, outcome


def results_table(lines: Mapping[str, Sequence[Path]], streams: Sequence[str]) -> Table:
    """Return the bits a byte of each held-out stream after each stage, and the forgetting, lines side by side.

    Args:
        lines: run folders by the name of their line, the oldest run first.
        streams: held-out streams, in the order of the columns.
    """
    table = Table(title="Held-out text, bits a byte (lower is better)", title_justify="left")
    table.add_column("after stage")
    for name in streams:
        table.add_column(name, justify="right")
    table.add_column("forgotten", justify="right")
    shown: set[str] = set()
    for label, line in lines.items():
        found = outcome(chain(with_ancestors([line[-1]])))
        if not shown:
            table.add_row("(untrained)", *_cells(found.start, streams), "")
        for stage, folder in enumerate(line):
            if str(folder) in shown:
                continue
            shown.add(str(folder))
            name = found.stages[stage] + ("" if stage == 0 else f", {label}")
            table.add_row(name, *_cells(found.losses[stage], streams), _forgotten(found, stage))
    return table


def _cells(losses: Mapping[str, float], streams: Sequence[str]) -> list[str]:
    return [f"{losses[name]:.3f}" if name in losses else "-" for name in streams]


def _forgotten(found: Outcome, stage: int) -> str:
    """Every older stream with what was lost of it since its own stage."""
    changed = found.changed[stage]
    return "  ".join(f"{name} {value:+.3f}" for name, value in changed.items())
