"""What a rank of a pool runs: recipes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from megacpt.engine.megatron import MegatronEngine
from megacpt.engine.protocol import StepReport
from megacpt.errors import MegacptError
from megacpt.recipes.execute import execute
from megacpt.recipes.recipe import load_recipe
from megacpt.recipes.result import collect, finding_rows, write_result

TINY = Path(__file__).parent / "tiny.yaml"


def recipe(out: str, seeds: int, changes: list[str] | None = None, stop_at: int | None = None) -> dict[str, Any]:
    """Run the tiny recipe; with `stop_at`, be asked to stop at that optimizer step of this session."""
    said: list[str] = []
    steps = 0
    original = MegatronEngine.train_step

    def train_step(self: MegatronEngine, *arguments: Any) -> StepReport:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    MegatronEngine.train_step = train_step  # type: ignore[method-assign]
    try:
        loaded = load_recipe(str(TINY), changes or [])
        done = execute(loaded, Path(out), seeds, said.append)
        if done is None:
            return {"said": said, "steps": steps, "complete": False}
        result = collect(loaded, done)
        write_result(result, Path(out))
    except MegacptError as error:
        return {"error": (type(error).__name__, str(error))}
    finally:
        MegatronEngine.train_step = original  # type: ignore[method-assign]
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return {
        "said": said,
        "steps": steps,
        "complete": True,
        "rows": finding_rows(result),
        "measures": result.measures,
        "tokens": result.tokens,
        "seconds": result.seconds,
    }
