"""The tables and cards of a report, as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from megacpt.evaluate.forgetting import average, backward_transfer
from megacpt.report.outcome import Outcome, Reading
from megacpt.report.record import RunRecord
from megacpt.report.style import colour
from megacpt.report.words import TIMES, UNKNOWN, duration, percent, plain, short_rate, short_tokens, signed, tone


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
        rows.append(("since then", _difference(found.changed[-1][stream])))
        rows += [
            (f"with {escape(label)}", _difference(other.changed[-1][stream]))
            for label, other in beside.items()
            if stream in other.changed[-1]
        ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return (
        f'<section class="card" style="--stream: {colour(index)}"><div class="name">{escape(stream)}</div>'
        f'<div class="big">{plain(now)} <small>bits a byte</small></div><dl>{listed}</dl></section>'
    )


def loss_table(found: Outcome, title: str) -> str:
    """The matrix of a line: a row a stage, a column a stream, and what was forgotten below."""
    head = "".join(f"<th>{escape(stream)}</th>" for stream in found.streams)
    rows = []
    if found.start:
        cells = "".join(f"<td>{plain(found.start.get(stream))}</td>" for stream in found.streams)
        rows.append(f"<tr><th>before</th>{cells}</tr>")
    for stage, name in enumerate(found.stages):
        cells = "".join(_loss_cell(found, stage, stream) for stream in found.streams)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    forgotten = found.forgotten[-1]
    if forgotten:
        cells = "".join(f"<td>{_difference(forgotten.get(stream))}</td>" for stream in found.streams)
        rows.append(f'<tr class="sum"><th>forgotten</th>{cells}</tr>')
    return (
        f"<div><h3>{escape(title)}</h3><table><thead><tr><th>after stage</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{_averages(found)}</div>"
    )


def _loss_cell(found: Outcome, stage: int, stream: str) -> str:
    value = plain(found.losses[stage].get(stream))
    if found.homes.get(stream) == stage:
        return f'<td class="home">{value}</td>'
    changed = found.changed[stage].get(stream)
    return f"<td>{value}{'' if changed is None else f'<small>{signed(changed)}</small>'}</td>"


def _averages(found: Outcome) -> str:
    mean, transfer = average(found.forgotten[-1]), backward_transfer(found.losses, found.homes)
    if mean is None:
        return ""
    return f'<p class="note">average forgetting {signed(mean)}, backward transfer {signed(transfer)}</p>'


def _difference(value: float | None) -> str:
    return f'<span class="{tone(value)}">{signed(value)}</span>'


def data_table(read: Sequence[Reading], stages: Sequence[str]) -> str:
    """Tokens of each stream in each stage, as a share of the stage, and how often the stream was read through."""
    head = "".join(f"<th>{escape(name)}</th>" for name in stages)
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
    return (
        f'<div class="wide"><table><thead><tr><th>stream</th>{head}<th>in all</th><th>passes</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def stage_table(line: Sequence[RunRecord]) -> str:
    """What each stage was: length, schedule, batch, replay, and how it ended."""
    names = (
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
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(_stage_row(record) for record in line)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _stage_row(record: RunRecord) -> str:
    stage, config = record.ledger.stage, record.config
    tokens = record.end - record.start
    replay = config.stage.replay
    speeds = sorted(point.tokens_per_second for point in record.train if math.isfinite(point.tokens_per_second))
    ended = [point.loss for point in record.train[-max(1, len(record.train) // 50) :]]
    cells = (
        short_tokens(tokens),
        f"{-(-tokens // config.tokens_per_step):,}",
        config.schedule.kind + (" (anneal)" if stage.kind == "anneal" and config.schedule.kind != "anneal" else ""),
        short_rate(stage.rate) if stage.rate is not None else UNKNOWN,
        f"{stage.batch} {TIMES} {stage.seq_length:,}",
        f"{percent(float(replay.share))} {replay.policy}" if replay.share else "none",
        f"{sum(ended) / len(ended):.3f}" if ended else UNKNOWN,
        f"{speeds[len(speeds) // 2]:,.0f}" if speeds else UNKNOWN,
        escape(", ".join(stage.layouts)) or UNKNOWN,
        duration(record.wall_seconds) if record.wall_seconds else UNKNOWN,
    )
    return f"<tr><th>{escape(record.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
