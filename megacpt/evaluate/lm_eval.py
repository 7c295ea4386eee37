"""Downstream tasks through the lm-eval package: multiple choice, perplexity, generated answers.

Nothing is fetched but what a task itself names: a task whose data set is on the Hugging Face Hub is loaded from there
by the packages of lm-eval, unless it is in their cache or HF_HUB_OFFLINE=1 forbids it.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megacpt.data.tokenizer import Tokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.errors import ConfigError, DataError, MegacptError, SetupError, nearest
from megacpt.evaluate.instances import Instance
from megacpt.runtime.layout import is_first_rank

# Of texts such as perplexity, whose standard error has no closed form: enough for two digits of it.
BOOTSTRAP = 1000
# lm-eval's own seeds, so that its few-shot examples and the order of its choices are the ones that others report.
PYTHON_SEED, OTHER_SEED = 0, 1234


@dataclass(frozen=True)
class TaskScore:
    """One number of one task.

    Attributes:
        task: the task or group.
        metric: such as ``acc``, ``acc_norm`` or ``word_perplexity``.
        filter: how the answer was cut out of the text; ``none`` where there is nothing to cut.
        value: the mean over the questions, or what the metric makes of them.
        stderr: its standard error; None where lm-eval gives none.
        questions: how many there were.
        fewshot: worked examples before each question; None for groups of tasks that differ.
        version: of the task.
        higher_is_better: None where lm-eval does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    questions: int
    fewshot: int | None
    version: str
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResults:
    """What lm-eval found.

    Attributes:
        scores: of every task and group, in lm-eval's order.
        questions: each question with an answer that is right or wrong, for `flips`.
        package: version of lm-eval.
    """

    scores: list[TaskScore]
    questions: list[Instance]
    package: str

    def versions(self) -> dict[str, str]:
        """The version of each task of `questions`, by the name it has there."""
        by_task = {score.task: score.version for score in self.scores}
        return {q.stream: by_task.get(q.stream.split(":")[0], "") for q in self.questions}


def _no_progress(_what: str, _count: int) -> Callable[[int], None]:
    return lambda _: None


def require_package() -> None:
    """Raise SetupError unless lm-eval is installed; quick, to be asked before a large model is loaded."""
    if find_spec("lm_eval") is None:
        raise SetupError("--lm-eval needs the package lm-eval: pip install 'megacpt[eval]'")


def evaluate_tasks(
    engine: MegatronEngine,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    include_path: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    progress: Callable[[str, int], Callable[[int], object]] = _no_progress,
) -> TaskResults:
    """Run tasks of lm-eval; every rank calls this and gets the same answer, apart from standard errors.

    Args:
        engine: the model.
        tokenizer: the model's.
        tasks: names of tasks, groups or tags; ``*`` stands for any letters.
        include_path: a folder with YAML files of further tasks; its names go before lm-eval's own.
        limit: questions a task at most; None for all.
        fewshot: worked examples before each question; None for each task's own number.
        progress: hears what is asked and how far it is.

    Raises:
        SetupError: lm-eval is not installed.
        ConfigError: there is no such task.
        DataError: a task or its data set cannot be loaded.
    """
    # Before the packages read them: reading a local file is not to be reported to a server, and standard errors are not
    # worth a pool of processes forked from one that holds process groups.
    for variable, value in {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "DISABLE_MULTIPROC": "1"}.items():
        os.environ.setdefault(variable, value)
    require_package()
    from lm_eval.evaluator import evaluate

    from megacpt.evaluate.lm_eval_model import MegacptLM

    with _repeatable(), contextlib.redirect_stdout(sys.stderr):
        loaded = _one_after_another(lambda: _load(tasks, include_path))
        for task in loaded["tasks"].values():
            _set_fewshot(task, fewshot)
        found = _explained(
            lambda: evaluate(
                lm=MegacptLM(engine, tokenizer, progress),
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAP if is_first_rank() else 0,
            )
        )
    return TaskResults(list(_scores(found)), list(_questions(found["samples"])), version("lm_eval"))


def _load(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """lm-eval's tasks of these names. Its own, which take seconds to list, are looked at only where they are needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path: there is no folder {include_path}")
    folder = None if include_path is None else str(include_path)
    known = TaskManager(include_path=folder, include_defaults=False)
    if not all(known.match_tasks([name]) for name in names):
        known = TaskManager(include_path=folder)
    for name in names:
        if not known.match_tasks([name]):
            hint = nearest(name, known.all_tasks)
            raise ConfigError(f"--lm-eval: there is no task '{name}'{hint} (`lm_eval ls tasks` lists all)")
    loaded: dict[str, Any] = _explained(lambda: known.load(known.match_tasks(list(names))))
    return loaded


def _explained(action: Callable[[], Any]) -> Any:
    """Run what tasks can do in ways of their own, and turn what goes wrong into an error that a user can act on."""
    try:
        return action()
    except MegacptError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"lm-eval could not run the task: {type(error).__name__}: {text}. Where its data set is missing, fetch it "
            "on a machine with a network (lm-eval keeps it in HF_HOME), or name local files in the task's YAML"
        ) from error


def _one_after_another(load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Let the first rank load, and the others after it, who find what it has put into the cache."""
    trouble: list[str | None] = [None]
    found: dict[str, Any] = {}
    if is_first_rank():
        try:
            found = load()
        except MegacptError as error:
            trouble = [str(error)]
            if dist.get_world_size() == 1:
                raise
    dist.broadcast_object_list(trouble, src=0)
    if trouble[0] is not None:
        raise DataError(trouble[0])
    return found if is_first_rank() else load()


def _set_fewshot(task: Any, fewshot: int | None) -> None:
    """Give a task its number of worked examples, unless it says that it has none."""
    own = task.get_config("num_fewshot")
    if own is None or (fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=fewshot or 0)
    task.set_fewshot_seed(seed=OTHER_SEED)


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Seed the global generators as lm-eval does, and put them back."""
    kept = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(OTHER_SEED)
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The numbers of lm-eval's results, whose keys are ``metric,filter``."""
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        higher = found["higher_is_better"].get(task) or {}
        for key, value in values.items():
            metric, comma, cut = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{cut}")
            yield TaskScore(
                task=task,
                metric=metric,
                filter=cut,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                questions=int(found["n-samples"].get(task, {}).get("effective", values.get("sample_len", 0))),
                fewshot=found["n-shot"].get(task),
                version=str(found["versions"].get(task, "")),
                higher_is_better=higher.get(metric),
            )


def _questions(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Instance]:
    """Every question whose answer is right or wrong, once for each metric and filter that says so."""
    for task, answered in samples.items():
        marks: dict[str, list[tuple[int, float]]] = {}
        for sample in answered:
            for metric in sample["metrics"]:
                if isinstance(value := sample[metric], int | float):
                    marks.setdefault(f"{task}:{metric}:{sample['filter']}", []).append((sample["doc_id"], value))
        for name, values in marks.items():
            if all(value in (0, 1) for _, value in values):
                for index, value in sorted(values):
                    yield Instance(name, index, None, np.array([value == 1]))
