"""The demo's result as a table: what each line of runs knows after each stage, and what it forgot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from megacpt.report.lineage import chain, with_ancestors
from megacpt.report.outcome import outcome


def results_table(lines: Mapping[str, Sequence[Path]], streams: Sequence[str]) -> Table:
    """Return the bits a byte of each held-out stream after each stage, lines side by side.

    The last column is the loss of the first stream minus its loss at the end of its own stage.

    Args:
        lines: run folders by the name of their line, the oldest run first.
        streams: held-out streams, in the order of the columns; the first is that of the first stage.
    """
    table = Table(title="Held-out text, bits a byte (lower is better)", title_justify="left")
    table.add_column("after stage", no_wrap=True)
    table.add_column("line", no_wrap=True)
    for name in streams:
        table.add_column(name, justify="right")
    table.add_column(f"{streams[0]} forgotten", justify="right")
    shown: set[Path] = set()
    for label, line in lines.items():
        found = outcome(chain(with_ancestors([line[-1]])))
        if not shown:
            table.add_row("(untrained)", "", *_cells(found.start, streams), "")
        for stage, folder in enumerate(line):
            if folder in shown:
                continue
            shown.add(folder)
            lost = found.changed[stage].get(streams[0])
            row = _cells(found.losses[stage], streams)
            table.add_row(found.stages[stage], label if stage else "", *row, "" if lost is None else f"{lost:+.3f}")
    return table


def _cells(losses: Mapping[str, float], streams: Sequence[str]) -> list[str]:
    return [f"{losses[name]:.3f}" if name in losses else "-" for name in streams]
