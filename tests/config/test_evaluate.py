"""The keys of evaluation: what layouts ask of its length, and how closely it looks after a boundary."""

from __future__ import annotations

import pytest

from megacpt.config import check_layout
from megacpt.errors import ConfigError
from tests.config.helpers import make_run


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["evaluate.seq_length=100000"], "evaluate.seq_length: 100000 is longer than model.max_seq_length"),
        (["parallel.context=2", "evaluate.seq_length=18"], "18 cannot be cut into 4 equal parts"),
        (
            ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true", "evaluate.seq_length=20"],
            "20 cannot be cut into 8 equal parts for the layout (parallel.context, parallel.sequence): take 16 or 24",
        ),
    ],
)
def test_a_length_that_does_not_fit(keys: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as found:
        check_layout(make_run(*keys))
    assert said in str(found.value)


@pytest.mark.parametrize("keys", [["evaluate.seq_length=17"], ["parallel.context=2", "evaluate.seq_length=20"]])
def test_a_length_that_fits(keys: list[str]) -> None:
    check_layout(make_run(*keys))


def test_how_closely_a_boundary_is_watched() -> None:
    run = make_run()
    assert run.evaluate.dense is not None
    assert run.evaluate.dense.steps(10**9, 4096) == 512
    assert make_run("evaluate.dense=null").evaluate.dense is None
    assert run.evaluate.seq_length is None
    with pytest.raises(ConfigError, match=r"evaluate.dense.*more than zero"):
        make_run("evaluate.dense=0")


def test_how_many_tokens_are_routed() -> None:
    assert make_run().evaluate.routing == 8_000
    assert make_run("evaluate.routing=2k").evaluate.routing == 2_000
    assert make_run("evaluate.routing=null").evaluate.routing is None
    with pytest.raises(ConfigError, match=r"evaluate.routing.*at least one token"):
        make_run("evaluate.routing=0")
