"""The report of a lineage as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from megacpt import __version__
from megacpt.continuation.lineage.words import counted
from megacpt.data.files import write_bytes
from megacpt.errors import ConfigError
from megacpt.report.content import Content, Line, gather
from megacpt.report.document import to_json
from megacpt.report.figures import gap_figure, held_out_figure, mixture_figure, training_figure
from megacpt.report.numbers import gap_table, stream_table, summary_table
from megacpt.report.outcome import read_stages
from megacpt.report.routing_page import routing_section
from megacpt.report.style import CSS
from megacpt.report.svg import captioned, inline
from megacpt.report.tables import cards, data_table, key, line_key, loss_table, phase_table, stage_table
from megacpt.report.tree import tree_list
from megacpt.report.verdict import verdict
from megacpt.report.words import percent, short_tokens


def write_report(
    runs: Sequence[Path],
    out: Path,
    title: str | None = None,
    compare: Mapping[str, Sequence[Path]] | None = None,
    label: str | None = None,
    json_out: Path | None = None,
) -> Path:
    """Write the report of a lineage.

    Runs that the given ones descend from are found and drawn too. Where the runs branch, the longest line of descent
    is the subject of the page, and the other branches are drawn beside it.

    Args:
        runs: run folders, or folders that hold them, in any order.
        out: the HTML file; it is replaced at once or not at all.
        title: heading of the page; the names of the stages if left out.
        compare: other lines of descent by name, to be drawn beside, each with its run folders.
        label: what the subject is called beside others.
        json_out: a file for the same as JSON.

    Returns:
        `out`.

    Raises:
        CheckpointError: a folder holds no run, a ledger is damaged, or nothing has been measured yet.
        ConfigError: a run.yaml is damaged, or `out` is a folder.
    """
    for path, example in ((out, "report.html"), (json_out, "report.json")):
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder: give the name of a file, such as {path / example}")
    content = gather(runs, title, compare, label)
    page, data = _page(content), to_json(content)
    for place, text in ((out, page), (json_out, data)):
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(place, text.encode())
    return out


def _page(content: Content) -> str:
    line = content.subject.line
    measured = (*_held_out(content), *_boundaries(content), *routing_section(content))
    body = "\n".join((*_introduction(content), *measured, *_training(content)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(content.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(content.title)}</h1>\n{_facts(line)}\n{body}\n{_footer(content)}\n</main>\n</body>\n</html>\n"
    )


def _introduction(content: Content) -> Iterator[str]:
    found, others = content.subject.found, {name: other.found for name, other in content.others.items()}
    if found.streams:
        yield f'<p class="verdict">{verdict(found, others)}</p>'
    yield from (f'<p class="warning">{text}</p>' for text in _warnings(content.subject.line))
    if found.streams:
        yield cards(found, others)
    yield "<h2>Lineage</h2>"
    yield tree_list(content.roots)


def _held_out(content: Content) -> Iterator[str]:
    subject, streams = content.subject, content.subject.found.streams
    if not streams:
        return
    yield "<h2>Held-out loss, bits a byte</h2>"
    compared = {name: other.line for name, other in content.others.items()}
    drawn = inline(
        "held-out",
        f"Held-out bits a byte of {', '.join(streams)} by tokens",
        lambda size: held_out_figure(subject.line, streams, compared, size),
    )
    above = "" if subject.line[0].ledger.parent else " The first steps of a new model lie above the plot."
    caption = f"On text that the model is never trained on; lower is better.{above}"
    named = line_key([content.label, *compared]) if compared else ""
    yield captioned(drawn, caption, key(streams, content.colours, small=True) + named)
    yield "<h2>Learned and forgotten</h2>"
    yield (
        '<p class="note">Held-out bits a byte after each stage. The framed number ends the own stage of a stream; '
        "small numbers and shades are the change since then. Forgotten: how much worse it is now than after the best "
        "stage before.</p>"
    )
    lines = {content.label: subject, **content.others} if content.others else {"": subject}
    yield f'<div class="tables">{"".join(loss_table(told.found, name) for name, told in lines.items())}</div>'
    yield summary_table({name: (told.found, told.measured) for name, told in lines.items()})
    yield "<h3>Each stream</h3>"
    yield stream_table(subject.found, subject.measured)


def _boundaries(content: Content) -> Iterator[str]:
    gaps, others = content.subject.measured.gaps, content.others
    if not gaps:
        return
    yield "<h2>After each boundary</h2>"
    yield (
        '<p class="note">What a boundary did to the streams of earlier stages. A stability gap is the part of a rise '
        "that was won back later in the stage; the part that was not is forgotten. Won back: nine tenths of it. Area: "
        "bits a byte times steps.</p>"
    )
    stages = content.subject.found.stages
    beside = {name: content.apart(other) for name, other in others.items()}
    drawn = inline(
        "gaps",
        "Change of the held-out loss of older streams by steps since each boundary",
        lambda size: gap_figure(gaps, stages, content.colours, beside, size),
    )
    streams = list(dict.fromkeys(gap.stream for gap in gaps))
    caption = "Change since the boundary in bits a byte; a dot is the peak of a gap. The first steps are wide."
    named = line_key([content.label, *beside]) if beside else ""
    yield captioned(drawn, caption, key(streams, content.colours) + named)
    tables = [gap_table(gaps, stages, content.label if others else "")]
    tables += [gap_table(beside[name], other.found.stages, name) for name, other in others.items() if beside[name]]
    yield f'<div class="tables">{"".join(tables)}</div>'


def _training(content: Content) -> Iterator[str]:
    line, streams, mixed = content.subject.line, content.subject.found.streams, content.mixed
    if any(record.train for record in line):
        yield "<h2>Training</h2>"
        drawn = inline(
            "training",
            "Training loss, learning rate and throughput by tokens of the lineage",
            lambda size: training_figure(line, streams, size),
        )
        caption = "On each stage's own mixture, so the level changes where the mixture does. Bold: running mean."
        yield captioned(drawn, caption)
    if mixed:
        yield "<h2>Mixture</h2>"
        names = list(dict.fromkeys(stream for mixture in mixed for stream in mixture.streams))
        drawn = inline(
            "mixture",
            "Shares of the streams in the mixture by tokens of the lineage",
            lambda size: mixture_figure(line, streams, mixed, content.colours, size),
        )
        faint = any(replayed for mixture in mixed for replayed in mixture.replayed)
        yield captioned(drawn, "Shares of the samples.", key(names, content.colours, faint=faint))
        phases = "".join(phase_table(mixture) for mixture in mixed if mixture.phases)
        if phases:
            yield '<p class="note">Stages whose mixture changed on the way; between two rows it changes evenly.</p>'
            yield f'<div class="tables">{phases}</div>'
    yield "<h2>What was read</h2>"
    yield '<p class="note">Tokens by stage. Passes: how many times the stream was read through, replay included.</p>'
    yield data_table(content.read, [stage.name for stage in read_stages(line)])
    yield "<h2>Stages</h2>"
    yield stage_table(line)


def _facts(line: Line) -> str:
    last = line[-1]
    model, tokenizer = last.config.model, last.ledger.tokenizer
    facts = (
        f"{short_tokens(model.parameters(tokenizer['vocab_size']))} parameters",
        f"{model.layers} layers of {model.hidden:,}",
        f"tokenizer {Path(tokenizer['spec']).name}",
        f"{short_tokens(last.end)} tokens in {counted(len(read_stages(line)), 'stage')}",
    )
    return f'<p class="facts">{escape(" · ".join(facts))}</p>'


def _warnings(line: Line) -> Iterator[str]:
    """What a reader must know before trusting the numbers."""
    last = line[-1]
    if not last.complete:
        share = (last.end - last.start) / last.config.stage.tokens
        yield f"The stage {escape(last.name)} is not complete: {percent(share)} of its tokens so far."
    drawn = {len(record.ledger.stages) for record in line}
    missing = [
        stage.name
        for number, stage in enumerate(last.ledger.stages, 1)
        if number not in drawn and stage.kind != "converted"
    ]
    if missing:
        yield f"Runs of earlier stages are not where they were, and are not drawn: {escape(', '.join(missing))}."
    for record in line:
        wild = sum(not math.isfinite(point.loss) for point in record.train)
        if wild:
            yield f"The training loss of {escape(record.name)} was not finite at {counted(wild, 'logged step')}."
        if record.unreadable:
            lines_left_out = counted(record.unreadable, "line")
            yield f"{escape(str(record.folder))}: {lines_left_out} of the metrics could not be read."


def _footer(content: Content) -> str:
    lines = (content.subject, *content.others.values())
    folders = dict.fromkeys(str(record.folder) for told in lines for record in told.line)
    return f"<footer>Drawn by megacpt {__version__} from {escape(', '.join(folders))}</footer>"
