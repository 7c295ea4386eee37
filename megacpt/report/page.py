"""The report of a lineage as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from megacpt import __version__
from megacpt.data.files import write_bytes
from megacpt.errors import CheckpointError, ConfigError
from megacpt.report.figures import held_out_figure, training_figure
from megacpt.report.lineage import chain, lines, with_ancestors
from megacpt.report.outcome import Outcome, outcome, readings
from megacpt.report.record import RunRecord, load_run
from megacpt.report.style import CSS
from megacpt.report.svg import inline
from megacpt.report.tables import cards, data_table, loss_table, stage_table
from megacpt.report.verdict import verdict
from megacpt.report.words import counted, percent, short_tokens

Line = list[RunRecord]


def write_report(
    runs: Sequence[Path],
    out: Path,
    title: str | None = None,
    compare: Mapping[str, Sequence[Path]] | None = None,
    label: str | None = None,
) -> Path:
    """Write the report of a lineage.

    Runs that the given ones descend from are found and drawn too. Where the runs branch, the longest line of descent
    is the subject of the page, and the other branches are drawn beside it.

    Args:
        runs: run folders, in any order.
        out: the HTML file; it is replaced at once or not at all.
        title: heading of the page; the names of the stages if left out.
        compare: other lines of descent by name, to be drawn beside, each with its run folders.
        label: what the subject is called beside others.

    Returns:
        `out`.

    Raises:
        CheckpointError: a folder holds no run, a ledger is damaged, or nothing has been measured yet.
        ConfigError: a run.yaml is damaged, or `out` is a folder.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: give the name of a file, such as {out / 'report.html'}")
    line, branches = _subject([load_run(folder) for folder in with_ancestors(runs)])
    if not any(record.train or record.evaluations for record in line):
        raise CheckpointError(f"{line[-1].folder} has no metrics yet: they are written while it is trained")
    beside = dict(branches)
    for name, folders in (compare or {}).items():
        beside[name] = chain(with_ancestors(folders))
    name = label or (line[-1].folder.name if branches else "this lineage")
    page = _page(title or " → ".join(record.name for record in line), line, name, beside)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, page.encode())
    return out


def _subject(records: Sequence[RunRecord]) -> tuple[Line, dict[str, Line]]:
    """The longest line of descent, and the others by the name of their last folder."""
    found = lines(records)
    longest = max(found, key=lambda line: (len(line), line[-1].end))
    found.remove(longest)
    names = [line[-1].folder.name for line in found]
    unique = len(set(names)) == len(names)
    return longest, {name if unique else str(line[-1].folder): line for name, line in zip(names, found, strict=True)}


def _page(title: str, line: Line, label: str, beside: Mapping[str, Line]) -> str:
    found = outcome(line)
    others = {name: outcome(other) for name, other in beside.items()}
    body = "\n".join(_sections(line, found, label, beside, others))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{_facts(line)}\n{body}\n{_footer(line, beside)}\n</main>\n</body>\n</html>\n"
    )


def _sections(
    line: Line, found: Outcome, label: str, beside: Mapping[str, Line], others: Mapping[str, Outcome]
) -> Iterator[str]:
    if found.streams:
        yield f'<p class="verdict">{verdict(found, others)}</p>'
    yield from (f'<p class="warning">{text}</p>' for text in _warnings(line))
    if found.streams:
        yield cards(found, others)
        yield "<h2>Held-out loss, bits a byte</h2>"
        drawn = inline(
            "held-out",
            f"Held-out bits a byte of {', '.join(found.streams)} by tokens",
            lambda: held_out_figure(line, found.streams, label, beside),
        )
        above = "" if line[0].ledger.parent else " The first steps of a new model lie above the plot."
        yield _figure(drawn, f"On text that the model is never trained on; lower is better.{above}")
        yield "<h2>Learned and forgotten</h2>"
        yield (
            '<p class="note">Held-out bits a byte after each stage. The shaded number ends the own stage of a stream; '
            "small numbers are the change since then. Forgotten: how much worse it is now than after the best stage "
            "before.</p>"
        )
        tables = [loss_table(found, label if others else "")]
        tables += [loss_table(other, name) for name, other in others.items()]
        yield f'<div class="tables">{"".join(tables)}</div>'
    if any(record.train for record in line):
        yield "<h2>Training</h2>"
        drawn = inline(
            "training",
            "Training loss and learning rate by tokens of the lineage",
            lambda: training_figure(line, found.streams),
        )
        yield _figure(
            drawn, "On each stage's own mixture, so the level changes where the mixture does. Bold: running mean."
        )
    yield "<h2>What was read</h2>"
    yield '<p class="note">Tokens by stage. Passes: how many times the stream was read through, replay included.</p>'
    yield data_table(readings(line), found.stages)
    yield "<h2>Stages</h2>"
    yield stage_table(line)


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _facts(line: Line) -> str:
    last = line[-1]
    model, tokenizer = last.config.model, last.ledger.tokenizer
    facts = (
        f"{short_tokens(model.parameters(tokenizer['vocab_size']))} parameters",
        f"{model.layers} layers of {model.hidden:,}",
        f"tokenizer {Path(tokenizer['spec']).name}",
        f"{short_tokens(last.end)} tokens in {counted(len(last.ledger.stages), 'stage')}",
    )
    return f'<p class="facts">{escape(" · ".join(facts))}</p>'


def _warnings(line: Line) -> Iterator[str]:
    """What a reader must know before trusting the numbers."""
    last = line[-1]
    if not last.complete:
        share = (last.end - last.start) / last.config.stage.tokens
        yield f"The stage {escape(last.name)} is not complete: {percent(share)} of its tokens so far."
    missing = len(last.ledger.stages) - len(line)
    if missing:
        names = ", ".join(stage.name for stage in last.ledger.stages[:missing])
        yield f"Runs of earlier stages are not where they were, and are not drawn: {escape(names)}."
    for record in line:
        wild = sum(not math.isfinite(point.loss) for point in record.train)
        if wild:
            yield f"The training loss of {escape(record.name)} was not finite at {counted(wild, 'logged step')}."
        if record.unreadable:
            lines_left_out = counted(record.unreadable, "line")
            yield f"{escape(str(record.folder))}: {lines_left_out} of the metrics could not be read."


def _footer(line: Line, beside: Mapping[str, Line]) -> str:
    folders = dict.fromkeys(str(record.folder) for drawn in (line, *beside.values()) for record in drawn)
    return f"<footer>Drawn by megacpt {__version__} from {escape(', '.join(folders))}</footer>"
