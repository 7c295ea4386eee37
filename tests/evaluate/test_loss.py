"""Losses of held-out streams: by hand, in any layout, every token once, and beside training without a trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.stream import TokenStream
from megacpt.engine.protocol import Batch
from megacpt.errors import DataError
from megacpt.evaluate.loss import StreamLoss, evaluate_stream
from tests.pool import Pools
from tests.small import make_stream

CASES = "tests.evaluate.loss_cases"


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A held-out stream of some 40 windows, the last one cut short."""
    folder = make_stream(tmp_path_factory.mktemp("streams"), "english", 12)
    assert (TokenStream.open(folder).tokens - 1) % 16
    return str(folder)


def test_a_uniform_model_by_hand(pools: Pools, stream: str) -> None:
    ((found, entries),) = pools(1).run(f"{CASES}:uniform", stream=stream)
    opened = TokenStream.open(stream)
    assert found.loss == pytest.approx(math.log(entries), rel=1e-6)
    # The end of a document is a token without a byte, so there are fewer bytes than tokens.
    assert opened.meta.bytes == opened.tokens - opened.documents
    assert found.bits_per_byte == pytest.approx(math.log2(entries) * opened.tokens / opened.meta.bytes, rel=1e-6)
    assert found.tokens == opened.tokens - 1
    assert found.stream == "held-out"


@pytest.mark.parametrize("tokens", [None, 1, 16, 100])
def test_a_trained_model_by_hand(pools: Pools, stream: str, tokens: int | None) -> None:
    ((nats, found),) = pools(1).run(f"{CASES}:by_hand", stream=stream, tokens=tokens)
    opened = TokenStream.open(stream)
    assert found.tokens == (opened.tokens - 1 if tokens is None else tokens)
    assert found.loss * found.tokens == pytest.approx(nats, rel=2e-6)
    bits_per_token = nats / found.tokens / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits_per_token * opened.tokens / opened.meta.bytes, rel=2e-6)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "microbatch 1": (1, {"microbatch": 1}),
    "microbatch 3": (1, {"microbatch": 3}),
    "microbatch 64": (1, {"microbatch": 64}),
    "dp2": (2, {}),
    "dp2 microbatch 5": (2, {"microbatch": 5}),
    "tp2": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "cp2": (2, {"parallel": {"context": 2}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "pp2 interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "pp2 interleaved microbatch 7": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "microbatch": 7}),
}
DEEP = {"layers": 4}


@pytest.fixture(scope="module")
def alone(pools: Pools, stream: str) -> StreamLoss:
    """The loss in one process."""
    (found,) = pools(1).run(f"{CASES}:evaluate", stream=stream, model=DEEP)
    assert isinstance(found, StreamLoss)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_does_not_matter(pools: Pools, stream: str, alone: StreamLoss, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    for found in pools(ranks).run(f"{CASES}:evaluate", stream=stream, model=DEEP, **changes):
        assert found.tokens == alone.tokens
        assert found.loss == pytest.approx(alone.loss, rel=1e-6)
        assert found.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (1, {"precision": "bfloat16"}),
        (2, {"parallel": {"distributed_optimizer": True}}),
        (2, {"parallel": {"pipeline": 2}}),
    ],
)
def test_training_does_not_notice(pools: Pools, stream: str, ranks: int, changes: dict[str, Any]) -> None:
    for found in pools(ranks).run(f"{CASES}:beside_training", stream=stream, **changes):
        assert found == {"untouched": True, "same": True}


# Dealing windows to ranks: what each data-parallel rank sends through its engine, without a model.


@dataclass
class Listener:
    """One rank's engine without a model: it notes what it is given, and its answer means nothing."""

    data_rank: int
    data_size: int
    microbatch_multiple: int
    calls: list[Sequence[Batch]] = field(default_factory=list)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        self.calls.append(batches)
        return 1.0, 1


@dataclass
class Numbers:
    """A stream whose token at place i is i + 1."""

    tokens: int

    @property
    def meta(self) -> Any:
        return type("Meta", (), {"bytes": 2 * self.tokens})

    def read(self, offset: int, count: int) -> np.ndarray:
        assert offset + count <= self.tokens
        return np.arange(offset + 1, offset + 1 + count)


@given(
    st.integers(2, 700),
    st.none() | st.integers(1, 900),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_every_token_is_predicted_once(
    tokens: int, limit: int | None, length: int, microbatch: int, ranks: int, multiple: int
) -> None:
    stream: Any = Numbers(tokens)
    engines = [Listener(rank, ranks, multiple) for rank in range(ranks)]
    for engine in engines:
        evaluate_stream(engine, "x", stream, length, limit, microbatch)  # type: ignore[arg-type]
    expected = tokens - 1 if limit is None else min(limit, tokens - 1)
    predicted = []
    for engine in engines:
        assert [len(call) for call in engine.calls] == [len(call) for call in engines[0].calls]
        for call in engine.calls:
            assert len(call) % multiple == 0
            for batch in call:
                assert batch.tokens.shape == (microbatch, length + 1)
                assert batch.valid is not None
                predicted += list(batch.tokens[:, 1:][batch.valid])
                assert np.all((batch.tokens[:, :-1] + 1 == batch.tokens[:, 1:])[batch.valid])
    assert sorted(predicted) == list(range(2, expected + 2))


def test_a_stream_with_nothing_to_predict(tmp_path: Path) -> None:
    stream: Any = Numbers(1)
    stream.folder = tmp_path
    with pytest.raises(DataError, match="has 1 tokens: at least 2 are needed"):
        evaluate_stream(Listener(0, 1, 1), "x", stream, 8, None, 1)  # type: ignore[arg-type]
