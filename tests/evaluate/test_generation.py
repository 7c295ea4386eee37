"""Generation: the cache changes no logit, greedy and sampled tokens are what they should be, in every TP layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pool import Pools

CASES = "tests.evaluate.cases"
LATENT = {"kv_rank": 20, "q_rank": 12, "plain_dim": 8, "rope_dim": 4, "value_dim": 6}
SHARP_YARN = {"kind": "yarn", "factor": 4, "original_length": 8, "mscale": 0.7, "mscale_all_dim": 1.3}
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "multi-head": {"kv_heads": 4},
    "qk_norm": {"qk_norm": True},
    "partial rotary": {"rope": {"share": 0.5}},
    "scaled rotary": {"rope": {"scaling": {"kind": "linear", "factor": 2.0}}},
    "tied embeddings": {"tied_embeddings": True},
    "biases and gelu": {"bias": True, "activation": "gelu"},
    "neox": {"bias": True, "activation": "gelu", "norm": "layernorm", "parallel_residual": True},
    "output norms": {"norm_place": "output", "qk_norm": "all_heads", "bias": True},
    "sub-norms": {"activation": "relu2glu", "sub_norm": True},
    "a window": {"window": 4},
    "yarn": {"rope": {"scaling": {"kind": "yarn", "factor": 4, "original_length": 8}}},
    "latent": {"latent": LATENT, "kv_heads": None, "rope": {"scaling": SHARP_YARN}},
    "latent, in a window": {"latent": {**LATENT, "q_rank": None}, "kv_heads": None, "window": 7},
}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_a_full_forward(pools: Pools, name: str) -> None:
    (result,) = pools(1).run(f"{CASES}:cached_logits", model=MODELS[name], pieces=[5] + [1] * 15)
    assert_same(result["cached"], result["full"])


@pytest.mark.parametrize("name", ["grouped queries", "a window", "latent"])
def test_the_cache_takes_several_tokens_at_a_time(pools: Pools, name: str) -> None:
    (result,) = pools(1).run(f"{CASES}:cached_logits", model=MODELS[name], pieces=[3, 7, 1, 9])
    assert_same(result["cached"], result["full"])


@pytest.mark.parametrize("name", ["grouped queries", "output norms", "sub-norms", "latent"])
def test_cached_logits_under_tensor_parallelism(pools: Pools, name: str) -> None:
    (alone,) = pools(1).run(f"{CASES}:cached_logits", model=MODELS[name], pieces=[5] + [1] * 10)
    arguments: dict[str, Any] = {"model": MODELS[name], "pieces": [5] + [1] * 10, "parallel": {"tensor": 2}}
    for rank in pools(2).run(f"{CASES}:cached_logits", **arguments):
        assert_same(rank["cached"], alone["full"])


def test_greedy_is_the_argmax_of_full_forwards(pools: Pools) -> None:
    (result,) = pools(1).run(f"{CASES}:greedy", prompt=6, max_tokens=20)
    assert len(set(result["expected"])) > 5
    assert result["found"] == result["expected"]


@pytest.mark.parametrize("arguments", [{}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}])
def test_tensor_parallel_ranks_generate_what_one_rank_does(pools: Pools, arguments: dict[str, Any]) -> None:
    (alone,) = pools(1).run(f"{CASES}:sampled", max_tokens=24, **arguments)
    first, second = pools(2).run(f"{CASES}:sampled", parallel={"tensor": 2}, max_tokens=24, **arguments)
    assert first == second == alone


def test_sampling_depends_on_the_seed_alone(pools: Pools) -> None:
    def run(**arguments: Any) -> list[int]:
        return pools(1).run(f"{CASES}:sampled", max_tokens=24, temperature=1.0, **arguments)[0]  # type: ignore[no-any-return]

    assert run(seed=1) == run(seed=1, disturb=True)
    assert run(seed=1) != run(seed=2)


def test_it_stops_at_the_end_of_a_document_and_reports_each_token(pools: Pools) -> None:
    (result,) = pools(1).run(f"{CASES}:stopped", max_tokens=12)
    assert len(result["whole"]) == 12
    assert result["heard"] == result["whole"]
    assert result["ended"] == result["whole"][:2]
    assert result["begun"][0] == result["begun"][1]
    assert result["training"]  # as it was before


def test_ids_beyond_the_vocabulary_are_never_chosen(pools: Pools) -> None:
    (found,) = pools(1).run(f"{CASES}:vocabulary", size=9)
    assert set(found) <= set(range(9))
    assert len(set(found)) > 4


def test_it_stops_at_the_longest_sequence_of_the_model(pools: Pools) -> None:
    ((found, longest),) = pools(1).run(f"{CASES}:longest")
    assert 50 + found == longest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": 64}, ("ConfigError", "64 tokens", "model.max_seq_length", "at most 63")),
        ({"prompt": 0}, ("ConfigError", "prompt is empty")),
        ({"max_tokens": 0}, ("ConfigError", "max-tokens 0")),
        ({"temperature": -1.0}, ("ConfigError", "temperature -1")),
        ({"top_k": 0}, ("ConfigError", "top-k 0")),
        ({"top_p": 1.5}, ("ConfigError", "top-p 1.5")),
    ],
)
def test_wrong_arguments_are_refused(pools: Pools, arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    (message,) = pools(1).run(f"{CASES}:refused", **arguments)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("parallel", "advice"),
    [
        ({"pipeline": 2}, "parallel.pipeline=1"),
        ({"context": 2}, "parallel.context=1"),
        ({"tensor": 2, "sequence": True}, "parallel.sequence=false"),
    ],
)
def test_layouts_without_whole_sequences_are_refused(pools: Pools, parallel: dict[str, Any], advice: str) -> None:
    for message in pools(2).run(f"{CASES}:refused", parallel=parallel):
        assert message.startswith("LayoutError")
        assert advice in message
