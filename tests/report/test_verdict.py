from __future__ import annotations

import math

from megacpt.evaluate.forgetting import change, forgetting
from megacpt.report.outcome import Outcome
from megacpt.report.verdict import verdict


def made(english: list[float], python: list[float], homes: dict[str, int] | None = None) -> Outcome:
    homes = {"english": 0, "python": 1} if homes is None else homes
    homes = {stream: home for stream, home in homes.items() if home < len(english)}
    losses = [{"english": e, "python": p} for e, p in zip(english, python, strict=True)]
    found = (forgetting(losses, homes), change(losses, homes))
    return Outcome(("first", "second")[: len(losses)], ("english", "python"), homes, {"english": 8.0}, losses, *found)


def test_a_first_stage_learns() -> None:
    assert verdict(made([2.3], [4.0]), {}) == "Learned <b>english</b> from 8.00 to 2.30 bits a byte."


def test_forgetting_is_named_and_compared() -> None:
    text = verdict(made([2.3, 2.42], [4.4, 2.0]), {"replay <0 %>": made([2.3, 2.9], [4.4, 1.9])})
    assert text == (
        "Learned <b>python</b> from 4.40 to 2.00 bits a byte. "
        '<span class="worse">Forgot</span> <b>english</b> by 0.12 (by 0.60 with replay &lt;0 %&gt;).'
    )


def test_what_is_kept_is_named_with_those_who_forgot_it() -> None:
    others = {"without": made([2.3, 2.9], [4.4, 1.9]), "fresh": made([2.3, 2.2], [4.4, 1.9])}
    assert verdict(made([2.3, 2.25], [4.4, 2.0]), others).endswith(
        '<span class="better">Kept</span> <b>english</b>, better by 0.05 (forgotten by 0.60 with without).'
    )
    assert verdict(made([2.3, 2.304], [4.4, 2.0]), {}).endswith('<span class="better">Kept</span> <b>english</b>.')


def test_a_loss_that_is_not_a_number_is_not_kept() -> None:
    text = verdict(made([2.3, math.nan], [4.4, 2.0]), {})
    assert '<span class="worse">Forgot</span> <b>english</b> by not a number.' in text


def test_nothing_to_say() -> None:
    assert verdict(made([2.3], [4.0], homes={}), {}) == "No held-out stream has been trained on yet."
