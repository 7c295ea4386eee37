"""Streams, phases, replay and controllers of a stage: what is accepted, and what is said where it is not."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import Part, PhaseConfig, check_streams, dump, run_from_mapping, timeline, weights_over_time
from megacpt.config.show import derived
from megacpt.errors import ConfigError
from tests.config.helpers import make_run, plain_run

EXTERNAL = "stage.replay={share: 25%, policy: external, streams: {web: {path: data/web, weight: 3}, code: data/code}}"
PHASES = "stage.phases=[{after: 10%, weights: {english: 2}, ramp: 20%}, {after: 8M tokens, replay: 10%}]"
CONTROLLER = ["stage.controller={}", "evaluate.streams={old: data/old-valid}"]


def test_defaults_of_a_stream() -> None:
    stream = make_run().stage.mixture["english"]
    settings = (stream.subset, stream.epochs, stream.select, stream.order, stream.parts)
    assert settings == (None, None, "random", "shuffled", 16)
    assert make_run().stage.phases == []
    assert make_run().stage.controller is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["stage.mixture.english.subset=25%", "stage.mixture.english.select=best"],
        ["stage.mixture.english.epochs=4", "stage.mixture.english.order=cyclical", "stage.mixture.english.parts=4"],
        ["stage.replay={share: 5%, policy: power_law, exponent: 0.5}"],
        ["stage.replay={share: 5%, policy: reservoir, size: 1B}"],
        [EXTERNAL],
        [PHASES],
        [*CONTROLLER, "stage.controller.max=30%", PHASES.replace(", replay: 10%", ", weights: {english: 3}")],
    ],
)
def test_everything_survives_a_dump(overrides: list[str]) -> None:
    run = make_run(*overrides)
    assert run_from_mapping(yaml.safe_load(dump(run))) == run


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["stage.mixture.english={path: x, subset: 5%, epochs: 2}"], "stage.mixture.english.epochs", "remove one"),
        (["stage.mixture.english={path: x, select: best}"], "stage.mixture.english.select", "the best of how much?"),
        (
            ["stage.mixture.english.subset=500 steps"],
            "stage.mixture.english.subset",
            "a part of the whole, such as 25%",
        ),
        (["stage.mixture.english.subset=0%"], "stage.mixture.english.subset", "a part of the whole, such as 25%"),
        (["stage.mixture.english.subset=1000"], "stage.mixture.english.subset", "the unit is missing"),
        (["stage.mixture.english.epochs=0.5"], "stage.mixture.english.epochs", "at least 1"),
        (["stage.mixture.english.order=random"], "stage.mixture.english.order", "one of shuffled, ascending"),
        (["stage.replay.policy=reservoir"], "stage.replay.size", "a reservoir needs its size"),
        (["stage.replay.size=1B"], "stage.replay.size", "only a reservoir has a size"),
        (["stage.replay.policy=external"], "stage.replay.streams", "needs a stream with a weight above 0"),
        (["stage.replay.streams={web: data/web}"], "stage.replay.streams", "only external replay reads these"),
        (["stage.phases=[{after: 50%}]"], "stage.phases.0", "nothing changes in this phase"),
        (["stage.phases=[{after: 50%, replay: 100%}]"], "stage.phases.0.replay", "would see nothing new"),
        (["stage.phases=[{after: 50%, weights: {english: 0}}]"], "stage.phases.0.weights", "all weights are 0"),
        (
            ["stage.phases=[{after: 50%, weights: {englisch: 1}}]"],
            "stage.phases.0.weights.englisch",
            "no such stream in stage.mixture; did you mean 'english'?",
        ),
        (
            ["stage.phases=[{after: 50%, replay: 1%}, {after: 10M, replay: 2%}]"],
            "stage.phases.1.after",
            "10M is not behind the phase before",
        ),
        (["stage.phases=[{after: 20M tokens, replay: 1%}]"], "stage.phases.0.after", "not before the end of the stage"),
        (["stage.phases=[{after: 50%, replay: 1%, ramp: 51%}]"], "stage.phases.0.ramp", "when the stage ends"),
        (
            ["stage.phases=[{after: 50%, replay: 1%, ramp: 20%}, {after: 60%, replay: 2%}]"],
            "stage.phases.0.ramp",
            "20% is not over when the next phase begins",
        ),
        (["stage.phases.0.after=50%"], "stage.phases.0.after", "stage.phases.0 is missing, not a section"),
        (CONTROLLER[:1], "stage.controller", "add one that is not in stage.mixture to evaluate.streams"),
        ([*CONTROLLER, "stage.controller.step=0%"], "stage.controller.step", "the share never moves"),
        ([*CONTROLLER, "stage.controller={min: 20%, max: 20%}"], "stage.controller.max", "is not above"),
        ([*CONTROLLER, "stage.controller.max=100%"], "stage.controller.max", "would see nothing new"),
        ([*CONTROLLER, "stage.replay.share=60%"], "stage.replay.share", "the controller starts from it"),
        ([*CONTROLLER, PHASES], "stage.phases.1.replay", "stage.controller sets the share of replay"),
    ],
)
def test_what_contradicts(overrides: list[str], key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_run(*overrides)
    message = str(caught.value)
    assert f": {key}: " in message
    assert reason in message
    assert len(message.splitlines()) == 1


def test_a_ramp_may_fill_the_stage() -> None:
    run = make_run("stage.phases=[{after: 0, replay: 50%, ramp: 100%}]")
    (times,) = timeline(run.stage.phases, run.stage.tokens, run.tokens_per_step, run.batch.seq_length)
    assert times == (0, 78_125)


def test_an_entry_of_a_list_on_the_command_line() -> None:
    run = make_run(PHASES, "stage.phases.1.replay=7%", "stage.phases.0.weights.english=4", EXTERNAL)
    assert run.stage.phases[1].replay == 0.07
    assert run.stage.phases[0].weights == {"english": 4}
    assert make_run("stage.replay.streams.web.path=data/web", "stage.replay.policy=external").stage.replay.streams
    assert make_run(EXTERNAL, "stage.replay.streams.code.weight=2").stage.replay.streams["code"].weight == 2


def test_a_list_whose_entries_are_commented_out() -> None:
    mapping = plain_run()
    mapping["stage"]["phases"] = None
    assert run_from_mapping(mapping) == make_run()


@given(
    st.integers(1, 10**6),
    st.integers(1, 4096),
    st.integers(1, 64),
    st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True).map(sorted),
)
def test_ramps_that_meet_do_not_overlap(tokens: int, length: int, sequences: int, marks: list[int]) -> None:
    """Phases whose ramps fill the stage in tokens fill it in samples too, without a gap and without an overlap."""
    ends = [*marks[1:], 1000]
    phases = [
        PhaseConfig.model_validate({"after": f"{a / 10}%", "replay": "1%", "ramp": f"{(b - a) / 10}%"})
        for a, b in zip(marks, ends, strict=True)
    ]
    times = timeline(phases, tokens, sequences * length, length)
    for (start, ramp), (after, _) in pairwise(times):
        assert abs(start + ramp - after) <= 1
        assert ramp >= 0
    assert times[-1][0] + times[-1][1] <= -(-tokens // length)
    assert all(
        abs(start * length - mark * tokens / 1000) <= length for (start, _), mark in zip(times, marks, strict=True)
    )


def test_weights_of_streams_that_are_not_named_stay() -> None:
    phases = [PhaseConfig.model_validate({"after": "10%", "weights": w}) for w in ({"b": 2}, {"a": 0, "b": 5})]
    assert weights_over_time({"a": 1, "b": 0}, phases) == [{"a": 1, "b": 0}, {"a": 1, "b": 2}, {"a": 0, "b": 5}]


def test_parts_of_a_whole() -> None:
    assert Part.parse("25%").tokens(1000, 1) == 250
    assert Part.parse("20M").tokens(10**9, 1) == 20_000_000
    assert Part.parse("300000 tokens") == Part.parse("300k")


def test_streams_from_outside_are_looked_for() -> None:
    with pytest.raises(ConfigError, match=r"stage\.replay\.streams\.code\.path: data/code does not exist"):
        check_streams(make_run(EXTERNAL))


def test_the_replayed_tokens_of_all_phases() -> None:
    run = make_run("stage.tokens=8192000", "stage.replay.share=10%")
    assert derived(run)["replay_tokens"] == 819_200
    phases = "stage.phases=[{after: 20%, weights: {english: 2}}, {after: 50%, replay: 30%, ramp: 20%}]"
    # 10% of the first half, 20% on the mean over a fifth, 30% of the rest.
    run = make_run("stage.tokens=8192000", "stage.replay.share=10%", phases)
    assert derived(run)["replay_tokens"] == 8_192_000 * 18 // 100
