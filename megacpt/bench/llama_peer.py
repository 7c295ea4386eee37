"""llama.cpp as a side of a measurement: the same weights as a GGUF file, run by another interpreter."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from megacpt.bench.ternary_decode import RandomTernary
from megacpt.config import ModelConfig, QuantiseConfig
from megacpt.convert.families import Source, Target
from megacpt.convert.to_gguf import write_gguf
from megacpt.convert.weights import Progress, Weights
from megacpt.data.tokenizer import BytesTokenizer
from megacpt.errors import SetupError
from megacpt.quant.matrix import Quantised

NAME = "llama.cpp TQ2_0"
_WORKER = Path(__file__).with_name("llama_cpp_worker.py")


class RandomWeights(Weights):
    """The weights of `RandomTernary`, for an export.

    Args:
        model: the sizes.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model, BytesTokenizer(), QuantiseConfig(grid="ternary"), model.name or "random")
        self.words = self.vocab  # both sides multiply with the rows that pad the vocabulary, too
        self._random = RandomTernary(model)

    def tensors(
        self,
        sources: list[Source],
        progress: Progress | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[Source, Target, Tensor | Quantised]]:
        """Yield all tensors, in order."""
        for source in sources:
            for target in source.targets:
                get = self._random.quantised if self.is_quantised(source) else self._random.tensor
                yield source, target, get(target.name)


class LlamaCpp:
    """A `ternary_decode.Side` that is a process of another interpreter.

    Args:
        process: of the worker, which has loaded its model.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        """See `ternary_decode.Side`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([prompt, count]) + "\n")
        answer = _answer(self._process)
        if answer is None:
            raise SetupError("llama.cpp ended in the middle of the measurement")
        read, decoded, tokens = answer
        return read, decoded, tokens


@contextmanager
def llama_cpp(python: Path, model: ModelConfig, folder: Path, threads: int, context: int) -> Iterator[LlamaCpp]:
    """llama.cpp with the weights of `RandomTernary`.

    Args:
        python: an interpreter that has llama-cpp-python.
        model: the sizes.
        folder: where the GGUF file is written.
        threads: of llama.cpp.
        context: the most tokens that it will hold.

    Raises:
        SetupError: the interpreter or the package gguf is missing, or llama.cpp does not load the model.
    """
    file = folder / "ternary.gguf"
    write_gguf(RandomWeights(model), file, "tq2_0")
    command = [str(python), str(_WORKER), str(file), str(threads), str(context)]
    with (folder / "llama.cpp.log").open("w+") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )
        except OSError as error:
            text = f"--llama-cpp {python}: {error.strerror}; give an interpreter with llama-cpp-python"
            raise SetupError(text) from error
        with process:
            try:
                if not _answer(process):
                    log.seek(0)
                    raise SetupError(_explained(python, log.read()))
                yield LlamaCpp(process)
            finally:
                process.kill()


def _explained(python: Path, said: str) -> str:
    last = [*said.strip().splitlines(), "it said nothing"][-1 if not said.strip() else -2]
    return (
        f"--llama-cpp {python}: llama.cpp did not start ({last}); give an interpreter that has llama-cpp-python "
        "(pip install llama-cpp-python)"
    )


def _answer(process: subprocess.Popen[str]) -> Any:
    """What the worker says next; None once it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else None
