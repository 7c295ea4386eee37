"""What a person sees while a run trains: a progress bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megacpt.engine.protocol import StepReport
from megacpt.evaluate.loss import StreamLoss
from megacpt.runtime.layout import is_first_rank
from megacpt.train.callbacks import Quiet, due
from megacpt.train.callbacks.evaluation import Evaluation
from megacpt.train.callbacks.metrics import Metrics
from megacpt.train.loop import Run

# Lines a stage where there is no terminal for a bar.
LINES = 20


class ProgressBar(Quiet):
    """Shows loss, rate, speed and the time that is left; only the first rank shows it.

    Args:
        metrics: where the numbers come from.
        evaluation: where the held-out losses come from.
        console: where to show them.
    """

    name = "progress"

    def __init__(self, metrics: Metrics, evaluation: Evaluation, console: Console | None = None) -> None:
        self.metrics, self.evaluation = metrics, evaluation
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.stride = 1
        self.shown: list[StreamLoss] = []

    def on_start(self, run: Run) -> None:
        """Start the bar."""
        if not is_first_rank():
            return
        stage = run.config.stage
        self.stride = max(1, run.config.stage_steps // LINES)
        going = f"resumed at step {run.step}" if run.step else f"{run.config.stage_steps} steps"
        self.console.print(
            f"[bold]{stage.name}[/bold] ({stage.kind}, {int(stage.tokens):,} tokens, {going}, {run.layout}) "
            f"in {run.config.run}",
            highlight=False,
            soft_wrap=True,
        )
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task(stage.name, total=run.config.stage_steps, completed=run.step, text="")
            self.bar.start()
            run.closing.callback(self.bar.stop)  # it hides the cursor
        if run.step:
            self.shown = self.evaluation.latest  # of an earlier session
        else:
            self._held_out(run)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Advance the bar; print a line now and then where there is none."""
        if not is_first_rank():
            return
        text = f"loss {report.loss:.3f}  rate {run.rate(run.step):.2e}"
        if "tokens_per_second" in self.metrics.latest:
            text += f"  {self.metrics.latest['tokens_per_second']:,.0f} tokens/s"
        self._held_out(run)
        if self.bar is not None:
            self.bar.update(self.task, completed=run.step, text=text)
        elif due(run.step, self.stride, run.done or run.stopping):
            self.console.print(f"step {run.step}/{run.config.stage_steps}  {text}", highlight=False, soft_wrap=True)

    def _held_out(self, run: Run) -> None:
        """Print the held-out losses when there are new ones."""
        if self.evaluation.latest and self.evaluation.latest is not self.shown:
            losses = "  ".join(f"{r.stream} {r.bits_per_byte:.3f}" for r in self.evaluation.latest)
            self.console.print(f"step {run.step}: held-out bits a byte: {losses}", highlight=False, soft_wrap=True)
            self.shown = self.evaluation.latest
