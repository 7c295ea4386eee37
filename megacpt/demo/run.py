"""The demo: the main job of megacpt on real text, in a few minutes and without a download.

English, then Python, with and without replay; each released by annealing a branch. Every part is skipped when it is
done and resumed when it is not, so that the same command goes on after any interruption.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from megacpt.checkpoint.store import find_checkpoint
from megacpt.config import RunConfig
from megacpt.continuation.boundary import annealed_config
from megacpt.data.files import write_bytes
from megacpt.data.prepare import prepare
from megacpt.demo.corpora import write_corpora
from megacpt.demo.stages import STREAMS, TRUNK_TOKENS, continued, trunk
from megacpt.demo.table import results_table
from megacpt.report.page import write_report
from megacpt.train.run import train

# A model this small gains nothing from more threads, and the numbers do not depend on the machine's core count.
THREADS = 2


@dataclass(frozen=True)
class DemoResult:
    """What the demo left.

    Attributes:
        runs: the run folders of each line, by its name: trunk, continued, release.
        page: the report.
        complete: False if the demo was asked to stop; the same command goes on.
    """

    runs: dict[str, list[Path]]
    page: Path | None
    complete: bool


def demo(
    out: Path, replay: float = 0.25, seed: int = 1234, tokens: int = TRUNK_TOKENS, console: Console | None = None
) -> DemoResult:
    """Train on English, continue on Python with and without replay, release both, and report.

    Args:
        out: folder for texts, streams, runs and the report.
        replay: share of the samples of the second stage that come from the first one's stream.
        seed: of weights and data order.
        tokens: length of the first stage; the second is half of it, each release a tenth of the second.
        console: where to print.
    """
    console = console or Console(stderr=True)
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    console.print("writing and tokenising the texts", highlight=False)
    streams = prepare_streams(out)
    runs = out / "runs"
    first = trunk(runs / "english", streams, tokens, seed)
    lines: dict[str, list[Path]] = {}
    shares = list(dict.fromkeys((replay, 0.0)))
    count = 1 + 2 * len(shares)
    console.print(f"[1/{count}] train on English")
    if not _trained(first, None):
        return DemoResult(lines, None, False)
    for number, share in enumerate(shares):
        label = f"replay {share:.0%}"
        console.print(f"[{2 * number + 2}/{count}] continue on Python, {label}")
        line = [first.run, runs / f"python-replay{share:.0%}".rstrip("%")]
        second = continued(first, line[-1], streams["python"], tokens // 2, share)
        line.append(runs / f"release-replay{share:.0%}".rstrip("%"))
        if not _trained(second, first.run):
            return DemoResult(lines, None, False)
        console.print(f"[{2 * number + 3}/{count}] release: anneal a branch of it")
        branch, origin = annealed_config(second.run, "10%", line[-1], [])
        if not train(branch, origin).complete:
            return DemoResult(lines, None, False)
        lines[label] = line
    page = write_report(
        [lines[f"replay {replay:.0%}"][-1]],
        out / "index.html",
        "English, then Python: what replay keeps",
        compare={label: [line[-1]] for label, line in lines.items() if label != f"replay {replay:.0%}"},
        label=f"replay {replay:.0%}",
    )
    write_next_stage(out, tokens // 2)
    console.print(results_table(lines, STREAMS))
    return DemoResult(lines, page, True)


def prepare_streams(out: Path) -> dict[str, Path]:
    """Write the texts of the three domains and tokenise them: train and held-out streams by name."""
    streams: dict[str, Path] = {}
    for name, corpus in write_corpora(out / "texts").items():
        for key, text in ((name, corpus.train), (f"{name}-valid", corpus.valid)):
            streams[key] = out / "data" / key
            prepare([text], "bytes", streams[key], workers=1, progress=False)
    return streams


def _trained(config: RunConfig, parent: Path | None) -> bool:
    """Train a run to its end; False if it was asked to stop."""
    return train(config, None if parent is None else find_checkpoint(parent)).complete


def next_commands(out: Path, runs: Mapping[str, list[Path]]) -> list[str]:
    """Return three commands with which a person goes on with text of their own, after `write_next_stage`."""
    trunk_run, release = next(iter(runs.values()))[1:]
    return [
        f"megacpt generate {release} --prompt 'def main(' --temperature 0.7",
        f"megacpt data prepare MY_TEXT.jsonl --tokenizer bytes --holdout 5% --out {out}/data/mine",
        f"megacpt continue {trunk_run} {out}/mine.yaml --run {out}/runs/mine",
    ]


def write_next_stage(out: Path, tokens: int) -> None:
    """Write the stage file that the last of `next_commands` names."""
    text = f"""\
# A stage on your own text: `megacpt continue {out}/runs/... {out}/mine.yaml --run {out}/runs/mine`
stage:
  name: mine
  tokens: {tokens}
  mixture: {{mine: {out}/data/mine}}
  replay: {{share: 25%, policy: seen}}   # a quarter of the samples from what the model has seen
evaluate:
  streams: {{mine: {out}/data/mine-valid}}
"""
    write_bytes(out / "mine.yaml", text.encode())
