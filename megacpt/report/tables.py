"""The tables and cards of a report, as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from megacpt.continuation.lineage.words import counted, duration
from megacpt.report.outcome import Outcome, Reading
from megacpt.report.record import RunRecord
from megacpt.report.shares import Mixture
from megacpt.report.style import COMPARED, css_colour
from megacpt.report.words import (
    TIMES,
    UNKNOWN,
    percent,
    plain,
    short_rate,
    short_tokens,
    signed,
    tone,
)

MOST_CORNERS = 24


def cards(found: Outcome, beside: Mapping[str, Outcome]) -> str:
    """A card for each held-out stream: where it is now, what was learned, what was forgotten."""
    return f'<div class="cards">{"".join(_card(i, name, found, beside) for i, name in enumerate(found.streams))}</div>'


def _card(index: int, stream: str, found: Outcome, beside: Mapping[str, Outcome]) -> str:
    now = found.losses[-1].get(stream)
    rows: list[tuple[str, str]] = []
    if stream in found.homes:
        rows.append(("before its stage", plain(found.before(stream))))
        rows.append(("after its stage", plain(found.own(stream))))
    else:
        rows.append(("at the start", plain(found.start.get(stream))))
        rows.append(("trained on", "never"))
    if stream in found.changed[-1]:
        rows.append(("since then", difference(found.changed[-1][stream])))
        rows += [
            (f"with {escape(label)}", difference(other.changed[-1][stream]))
            for label, other in beside.items()
            if stream in other.changed[-1]
        ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return (
        f'<section class="card" style="--stream: {css_colour(index)}"><div class="name">{escape(stream)}</div>'
        f'<div class="big">{plain(now)} <small>bits a byte</small></div><dl>{listed}</dl></section>'
    )


def key(names: Sequence[str], colours: Mapping[str, int], faint: bool = False, small: bool = False) -> str:
    """Which stream has which colour; `faint` also says how replay is drawn, `small` is for narrow screens only."""
    chips = [f'<span><i style="--stream: {css_colour(colours[name])}"></i>{escape(name)}</span>' for name in names]
    if faint:
        chips.append('<span><i class="faint" style="--stream: var(--ink)"></i>fainter: replay</span>')
    return f'<p class="key{" small" if small else ""}">{"".join(chips)}</p>'


def line_key(names: Sequence[str]) -> str:
    """Which line of runs is drawn how: the first one solid, the others as in `COMPARED`."""
    chips = []
    for number, name in enumerate(names):
        style = COMPARED[(number - 1) % len(COMPARED)] if number else "-"
        lengths = [] if isinstance(style, str) else [f"{2 * part:g}" for part in style[1]]
        dashes = f' stroke-dasharray="{" ".join(lengths)}"' if lengths else ""
        line = f'<line x1="0" y1="4" x2="30" y2="4" stroke="currentColor" stroke-width="2"{dashes}/>'
        chips.append(f'<span><svg viewBox="0 0 30 8" aria-hidden="true">{line}</svg>{escape(name)}</span>')
    return f'<p class="key">{"".join(chips)}</p>'


def scrolled(head: Sequence[str], rows: Sequence[str], words: int = 1) -> str:
    """A table of ready rows, as wide as it needs to be; its head is text, and the first `words` columns are words."""
    styles = [' class="text"'] * words + [""] * (len(head) - words)
    cells = "".join(f"<th{style}>{escape(name)}</th>" for style, name in zip(styles, head, strict=True))
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def loss_table(found: Outcome, title: str) -> str:
    """The matrix of a line: a row a stage, a column a stream, shaded by what was forgotten."""
    rows = []
    if found.start:
        cells = "".join(_loss_cell(found, -1, stream) for stream in found.streams)
        rows.append(f"<tr><th>before</th>{cells}</tr>")
    for stage, name in enumerate(found.stages):
        cells = "".join(_loss_cell(found, stage, stream) for stream in found.streams)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    forgotten = found.forgotten[-1]
    if forgotten:
        cells = "".join(f"<td>{difference(forgotten.get(stream))}</td>" for stream in found.streams)
        rows.append(f'<tr class="sum"><th>forgotten</th>{cells}</tr>')
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<div>{heading}{scrolled(['after stage', *found.streams], rows)}</div>"


def _loss_cell(found: Outcome, stage: int, stream: str) -> str:
    value = plain(found.after(stage).get(stream))
    if found.homes.get(stream) == stage:
        return f'<td class="home">{value}</td>'
    changed = found.changed[stage].get(stream) if stage >= 0 else None
    if changed is None or not math.isfinite(changed):
        return f"<td>{value}{'' if changed is None else f'<small>{signed(changed)}</small>'}</td>"
    largest = max(abs(x) for row in found.changed for x in row.values() if math.isfinite(x))
    heat = 0.6 * abs(changed) / max(largest, 0.02)
    return (
        f'<td class="heat {"up" if changed > 0 else "down"}" style="--heat: {heat:.2f}">{value}'
        f"<small>{signed(changed)}</small></td>"
    )


def difference(value: float | None) -> str:
    """A difference in loss with its sign, coloured."""
    return f'<span class="{tone(value)}">{signed(value)}</span>'


def phase_table(mixture: Mixture) -> str:
    """The corners of the shares of a stage whose mixture changed on the way."""
    head = ["tokens into the stage"]
    for stream, replayed in zip(mixture.streams, mixture.replayed, strict=True):
        head.append(f"{stream} (replay)" if replayed else stream)
    rows = [
        f"<tr><th>{short_tokens(place - mixture.start)}</th>"
        f"{''.join(f'<td>{percent(share)}</td>' for share in shares)}</tr>"
        for place, shares in mixture.points[:MOST_CORNERS]
    ]
    left = len(mixture.points) - MOST_CORNERS
    more = f'<p class="note">{counted(left, "more point")} in the JSON of this report.</p>' if left > 0 else ""
    return f"<div><h3>{escape(mixture.stage)}</h3>{scrolled(head, rows)}{more}</div>"


def data_table(read: Sequence[Reading], stages: Sequence[str]) -> str:
    """Tokens of each stream in each stage, as a share of the stage, and how often the stream was read through."""
    rows = []
    for stream in read:
        cells = "".join(
            f"<td>{short_tokens(tokens)}<small>{'replay, ' if replay else ''}{percent(share)}</small></td>"
            if tokens
            else f"<td>{UNKNOWN}</td>"
            for tokens, share, replay in zip(stream.tokens, stream.shares, stream.replayed, strict=True)
        )
        rows.append(
            f"<tr><th>{escape(stream.name)}</th>{cells}<td>{short_tokens(sum(stream.tokens))}</td>"
            f"<td>{stream.passes:.2f}{TIMES}</td></tr>"
        )
    return scrolled(["stream", *stages, "in all", "passes"], rows)


STAGE_HEAD = (
    "stage",
    "tokens",
    "steps",
    "schedule",
    "rate",
    "batch",
    "replay",
    "training loss",
    "tokens/s",
    "layout",
    "time",
)


def stage_table(line: Sequence[RunRecord]) -> str:
    """What each stage was: length, schedule, batch, replay, and how it ended."""
    return scrolled(STAGE_HEAD, [_stage_row(record) for record in line])


def _stage_row(record: RunRecord) -> str:
    stage, config = record.ledger.stage, record.config
    tokens = record.end - record.start
    replay = config.stage.replay
    speed, loss = record.speed, record.ended
    cells = (
        short_tokens(tokens),
        f"{-(-tokens // config.tokens_per_step):,}",
        config.schedule.kind + (" (anneal)" if stage.kind == "anneal" and config.schedule.kind != "anneal" else ""),
        short_rate(stage.rate) if stage.rate is not None else UNKNOWN,
        f"{stage.batch} {TIMES} {stage.seq_length:,}",
        f"{percent(float(replay.share))} {replay.policy}" if replay.share else "none",
        plain(loss),
        UNKNOWN if speed is None else f"{speed:,.0f}",
        escape(", ".join(stage.layouts)) or UNKNOWN,
        duration(record.wall_seconds) if record.wall_seconds else UNKNOWN,
    )
    return f"<tr><th>{escape(record.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
