"""The decoder computes the Llama that is written down plainly, whatever pieces its tokens come in."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.errors import CheckpointError, ConfigError
from megacpt.ops.packed_linear import PackedMatrix, packed_linear
from megacpt.quant.activations import round_tokens
from megacpt.serve.decoder import Decoder
from megacpt.serve.rotary import Rotary
from tests.serve.llama import MadeUp, model_config, reference

TOKENS = [int(token) for token in torch.randint(0, 80, (48,), generator=torch.Generator().manual_seed(1))]
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "multi-head": {"kv_heads": 4},
    "wide heads": {"head_dim": 24},
    "qk_norm": {"qk_norm": True},
    "partial rotary": {"rope": {"share": 0.5}},
    "scaled rotary": {"rope": {"base": 500.0, "scaling": {"kind": "linear", "factor": 2.0}}},
    "tied embeddings": {"tied_embeddings": True},
    "biases of the attention": {"qkv_bias": True},
    "biases": {"bias": True},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "group scales": {"columns": 2},
    "half embeddings": {"stored": torch.bfloat16},
    "plain attention": {"plain": ("self_attn",)},
    "plain half mlp": {"plain": ("mlp",), "stored": torch.float16},
    "dense": {"plain": ("proj",)},
}


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 2e-6) -> None:
    """Equal to a share of the largest logit."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_a_plain_llama(name: str) -> None:
    source = MadeUp(model_config(**MODELS[name]))
    decoder = Decoder(source)
    close(decoder.logits(TOKENS, decoder.cache()), reference(source, TOKENS))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_taken_in_the_form_that_they_are_stored_in(name: str) -> None:
    source = MadeUp(model_config(), **WEIGHTS[name])
    decoder = Decoder(source)
    cache = decoder.cache()
    expected = reference(source, TOKENS)
    close(decoder.logits(TOKENS[:40], cache), expected[:40])
    close(decoder.feed(TOKENS[40:41], cache), expected[40])


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, len(TOKENS) - 1), max_size=12))
def test_pieces_change_nothing(name: str, cuts: set[int]) -> None:
    source = MadeUp(model_config(**MODELS[name]))
    decoder = Decoder(source)
    expected = decoder.logits(TOKENS, decoder.cache())
    cache, edges = decoder.cache(), [0, *sorted(cuts), len(TOKENS)]
    for start, end in pairwise(edges):
        close(decoder.feed(TOKENS[start:end], cache), expected[end - 1], 4e-6)
    assert cache.length == len(TOKENS)


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_is_the_plain_llama_too(name: str) -> None:
    source = MadeUp(model_config(**MODELS[name]), columns=2)
    decoder = Decoder(source)
    cache = decoder.cache()
    close(torch.stack([decoder.feed([token], cache) for token in TOKENS]), reference(source, TOKENS))


def test_rounding_activations_moves_logits_a_little() -> None:
    source = MadeUp(model_config())
    decoder = Decoder(source, "int8")
    found, expected = decoder.logits(TOKENS, decoder.cache()), reference(source, TOKENS)
    close(found, expected, 0.05)
    assert float((found - expected).abs().max()) > 1e-4
    cache = decoder.cache()
    close(torch.stack([decoder.feed([token], cache) for token in TOKENS]), expected, 0.05)


@pytest.mark.parametrize("name", ["grouped queries", "qk_norm", "tied embeddings", "biases"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_in_bfloat16_give_the_logits_to_its_precision(name: str, stored: torch.dtype) -> None:
    source = MadeUp(model_config(**MODELS[name]), stored=stored, columns=2)
    decoder = Decoder(source, dtype=torch.bfloat16)
    expected, cache = reference(source, TOKENS), decoder.cache()
    assert {decoder.embedding.dtype, cache.keys.dtype, decoder.final_norm.dtype} == {torch.bfloat16}
    found = [*decoder.logits(TOKENS[:30], cache), *(decoder.feed([token], cache) for token in TOKENS[30:])]
    assert all(logits.dtype is torch.float32 for logits in found)
    close(torch.stack(found), expected, 0.04)


def test_activations_in_float8_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    source = MadeUp(model_config())
    decoder = Decoder(source, "fp8")
    cache = decoder.cache()
    found = [*decoder.logits(TOKENS[:40], cache), *(decoder.feed([token], cache) for token in TOKENS[40:])]

    def rounded(x: torch.Tensor, matrix: PackedMatrix, _: str) -> torch.Tensor:
        return packed_linear(round_tokens(x, "fp8"), matrix)

    monkeypatch.setattr("megacpt.serve.linear.packed_linear", rounded)
    close(torch.stack(found), decoder.logits(TOKENS, decoder.cache()), 1e-2)
    close(torch.stack(found), reference(source, TOKENS), 0.2)


def test_more_tokens_than_the_cache_holds_are_refused() -> None:
    decoder = Decoder(MadeUp(model_config()))
    cache = decoder.cache(10)
    decoder.feed(TOKENS[:9], cache)
    with pytest.raises(ConfigError, match=r"11 tokens are more than the 10 .* model.max_seq_length is 48"):
        decoder.feed(TOKENS[:2], cache)
    assert decoder.cache(1000).capacity == 48


def test_yarn_sharpens_what_is_rotated() -> None:
    """The first dim turns by 1 a position, as without scaling; its circle is wider by 0.1 ln(4) + 1."""
    scaling = {"kind": "yarn", "factor": 4.0, "original_length": 32}
    rotary = Rotary(model_config(rope={"scaling": scaling}), 3, torch.device("cpu"))
    wide = 0.1 * math.log(4) + 1
    assert rotary.cosines[:, 0].tolist() == pytest.approx([wide * math.cos(n) for n in range(3)])
    assert rotary.sines[:, 0].tolist() == pytest.approx([-wide * math.sin(n) for n in range(3)])
    slowest = rotary.dims // 2 - 1
    plain = Rotary(model_config(rope={"scaling": None}), 3, torch.device("cpu"))
    assert float(rotary.sines[2, slowest]) == pytest.approx(wide * float(plain.sines[2, slowest]) / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "gelu"}, r"model\.activation: gelu"),
        ({"moe": {"experts": 4, "top_k": 2}}, r"model\.moe: experts"),
        ({"norm": "layernorm"}, r"model\.norm: layernorm"),
        ({"norm_place": "output"}, r"model\.norm_place: output"),
        ({"parallel_residual": True}, r"model\.parallel_residual: "),
        ({"sub_norm": True}, r"model\.sub_norm: "),
        ({"window": 8}, r"model\.window: "),
        ({"qk_norm": "all_heads"}, r"model\.qk_norm: all_heads"),
        (
            {
                "latent": {"kv_rank": 8, "plain_dim": 8, "rope_dim": 4, "value_dim": 8},
                "kv_heads": None,
                "head_dim": None,
            },
            r"model\.latent: ",
        ),
    ],
)
def test_networks_without_code_are_refused(changes: dict[str, Any], words: str) -> None:
    source = MadeUp(model_config())
    source.model = model_config(**changes)
    with pytest.raises(ConfigError, match=words):
        Decoder(source)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_that_is_missing_or_of_another_shape_is_named(name: str) -> None:
    source = MadeUp(model_config())
    wider = MadeUp(model_config(hidden=96))
    for weights in ("matrices", "tensors"):
        if name in getattr(source, weights):
            getattr(source, weights)[name] = getattr(wider, weights)[name]
    with pytest.raises(CheckpointError, match=rf"{name} is \[.*96.*should be \[.*64"):
        Decoder(source)
    source.matrices.pop(name, None)
    source.tensors.pop(name, None)
    with pytest.raises(CheckpointError, match=f"no {name}"):
        Decoder(source)
