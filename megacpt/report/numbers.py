"""The tables of the measures: lines beside one another, each boundary, each stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from megacpt.evaluate.forgetting import average, backward_transfer, maximum
from megacpt.report.measures import Measures, StreamGap, notable
from megacpt.report.outcome import Outcome
from megacpt.report.tables import difference, scrolled
from megacpt.report.verdict import NOTICEABLE
from megacpt.report.words import UNKNOWN, plain, short_tokens, signed

Measured = tuple[Outcome, Measures]


def summary(found: Outcome, measured: Measures) -> dict[str, float | None]:
    """Return the numbers that a line comes down to, in bits a byte; None for what cannot be said of it.

    How each is defined is in docs/forgetting.md.
    """
    forgotten = found.forgotten[-1]
    most = maximum(forgotten)
    numbers = {
        "average_loss": found.averages[-1],
        "average_forgetting": average(forgotten),
        "maximum_forgetting": None if most is None else most[1],
        "backward_transfer": backward_transfer(found.losses, found.homes) if found.changed[-1] else None,
        "forward_transfer": average(found.forward),
        "learned": average(found.learned),
        "worst_case_loss": measured.worst_case,
        "deepest_gap": max((gap.gap.depth for gap in measured.gaps), default=None),
    }
    for window, swings in measured.windows.items():
        numbers[f"windowed_forgetting_{window}"] = average({s: swing.rise for s, swing in swings.items()})
        numbers[f"windowed_plasticity_{window}"] = average({s: swing.fall for s, swing in swings.items()})
    return numbers


_ROWS = {
    "average_loss": ("average loss", "of the streams trained on, now"),
    "average_forgetting": ("average forgetting", "above the best stage before; below 0 is better than ever"),
    "maximum_forgetting": ("maximum forgetting", "of the stream that lost most"),
    "backward_transfer": ("backward transfer", "what later stages gained on older streams"),
    "learned": ("learned", "mean gain of a stream in its own stage"),
    "forward_transfer": ("forward transfer", "gained on a stream before its own stage"),
    "worst_case_loss": ("worst-case loss", "mean of the highest losses since each stream was learned"),
    "deepest_gap": ("deepest stability gap", "rise after a boundary that was won back"),
}
_SIGNED = ("average_forgetting", "maximum_forgetting")
_GAINED = ("backward_transfer", "forward_transfer", "learned")


def summary_table(lines: Mapping[str, Measured]) -> str:
    """The numbers of each line, a column a line."""
    columns = [summary(*line) for line in lines.values()]
    rows = [
        _summary_row(name, about, [_styled(column[key], key) for column in columns])
        for key, (name, about) in _ROWS.items()
        if any(column[key] is not None for column in columns)
    ]
    windows = dict.fromkeys(window for _, measured in lines.values() for window in measured.windows)
    for window in windows:
        swings = [
            f"{plain(column.get(f'windowed_forgetting_{window}'))} / "
            f"{plain(column.get(f'windowed_plasticity_{window}'))}"
            for column in columns
        ]
        rows.append(_summary_row(f"within {window} steps", "largest rise / fall, mean of the streams", swings))
    return scrolled(["bits a byte", *lines], rows)


def _summary_row(name: str, about: str, cells: Sequence[str]) -> str:
    listed = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th>{name}<span class="about">{about}</span></th>{listed}</tr>'


def _styled(value: float | None, key: str) -> str:
    if key in _SIGNED:
        return difference(value)
    if key in _GAINED:
        return UNKNOWN if value is None else f'<span class="{_gain_tone(value)}">{signed(value)}</span>'
    return plain(value)


def _gain_tone(value: float) -> str:
    return "" if abs(value) < 0.0005 else "better" if value > 0 else "worse"


def gap_table(gaps: Sequence[StreamGap], stages: Sequence[str], title: str) -> str:
    """What each boundary did to each older stream."""
    head = ["into", "stream", "at the boundary", "highest", "gap depth", "peak", "won back after", "area", "at the end"]
    rows = [_gap_row(gap, stages[gap.stage]) for gap in gaps]
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<div>{heading}{scrolled(head, rows, words=2)}</div>"


def _gap_row(gap: StreamGap, stage: str) -> str:
    found = gap.gap
    deep = notable(found, NOTICEABLE)
    cells = [plain(found.before), difference(found.rise), plain(found.depth)]
    if deep and math.isfinite(found.depth):
        cells += [
            f"step {found.peak:,.0f}",
            f"{found.duration:,.0f} steps<small>{short_tokens(round(gap.duration_tokens))} tokens</small>",
            f"{found.area:,.2f}",
        ]
    else:
        cells += [UNKNOWN] * 3
    cells.append(difference(found.lasting))
    listed = "".join(f"<td>{cell}</td>" for cell in cells)
    style = "" if deep else ' class="faint"'
    return f'<tr{style}><th>{escape(stage)}</th><td class="text">{escape(gap.stream)}</td>{listed}</tr>'


def stream_table(found: Outcome, measured: Measures) -> str:
    """What each stream gained, its worst case, and the largest rise and fall of its loss in windows of steps."""
    windows = list(measured.windows)
    head = ["stream", "learned", "before that", "worst since", *(f"rise / fall in {window}" for window in windows)]
    rows = []
    for stream in found.streams:
        worst = measured.worst.get(stream)
        high = UNKNOWN
        if worst is not None:
            high = f"{plain(worst.bits_per_byte)}<small>at {short_tokens(worst.tokens)} tokens</small>"
        cells = [_styled(found.learned.get(stream), "learned"), _styled(found.forward.get(stream), "learned"), high]
        for window in windows:
            swing = measured.windows[window].get(stream)
            cells.append(UNKNOWN if swing is None else f"{plain(swing.rise)} / {plain(swing.fall)}")
        rows.append(f"<tr><th>{escape(stream)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return scrolled(head, rows)
