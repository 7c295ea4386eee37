from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megacpt.config import ModelConfig, load_model
from megacpt.errors import ConfigError

SIZES: dict[str, Any] = {"layers": 2, "hidden": 64, "ffn": 96, "heads": 4}
LATENT = {"kv_rank": 24, "plain_dim": 12, "rope_dim": 8, "value_dim": 10}


def test_defaults_that_follow_from_other_keys() -> None:
    model = load_model(SIZES)
    assert (model.kv_heads, model.head_dim) == (4, 16)
    assert load_model({**SIZES, "kv_heads": None, "head_dim": None}) == model
    assert load_model({**SIZES, "head_dim": 32}).head_dim == 32
    assert (model.value_dim, model.rotary_dim) == (16, 16)
    latent = load_model({**SIZES, "latent": LATENT, "hidden": 62})
    assert (latent.kv_heads, latent.head_dim, latent.value_dim, latent.rotary_dim) == (4, 20, 10, 8)


def test_padded_vocabulary() -> None:
    model = load_model(SIZES)
    assert [model.padded_vocab(n) for n in (1, 128, 129, 257)] == [128, 128, 256, 384]
    assert load_model({**SIZES, "vocab_size": 100, "vocab_multiple": 64}).padded_vocab(50) == 128
    with pytest.raises(ValueError, match="the vocabulary is not known"):
        model.padded_vocab()


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, 0),
        ({"tied_embeddings": True}, -128 * 64),
        ({"kv_heads": 2}, -2 * 2 * 64 * 2 * 16),
        ({"qk_norm": True}, 2 * 2 * 16),
        ({"qkv_bias": True}, 2 * 3 * 64),
        ({"bias": True}, 2 * (3 * 64 + 64 + 2 * 96 + 64)),
        ({"bias": True, "qkv_bias": True}, 2 * (3 * 64 + 64 + 2 * 96 + 64)),
        ({"activation": "gelu"}, -2 * 64 * 96),
        ({"activation": "geglu"}, 0),
        ({"head_dim": 32}, 2 * 4 * 64 * 64),
        ({"norm": "layernorm"}, 5 * 64),
        ({"norm_place": "output"}, 0),
        ({"qk_norm": "all_heads", "kv_heads": 2}, 2 * (-2 * 64 * 2 * 16 + 6 * 16)),
        ({"sub_norm": True}, 2 * (64 + 96)),
        ({"latent": LATENT}, 2 * (64 * 80 + 64 * 32 + 24 + 24 * 4 * 22 + 40 * 64 - 4 * 64 * 64)),
        (
            {"latent": {**LATENT, "q_rank": 20}},
            2 * (64 * 20 + 20 + 20 * 80 + 64 * 32 + 24 + 24 * 4 * 22 + 40 * 64 - 4 * 64 * 64),
        ),
    ],
)
def test_parameters(changes: dict[str, Any], extra: int) -> None:
    plain = 2 * 128 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64)
    assert load_model({**SIZES, **changes}).parameters(100) == plain + extra


def test_models_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_model(SIZES).layers = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "model.heads: 3 does not divide hidden, which is 64: take 1, 2 or 4, or give head_dim"),
        ({"kv_heads": 3}, "model.kv_heads: 3 does not divide heads, which is 4: take 1, 2 or 4"),
        ({"kv_heads": 8}, "model.kv_heads: 8 does not divide heads, which is 4: take 1, 2 or 4"),
        ({"rope": {"share": 0.2}}, "model.rope.share: 0.2 of head_dim 16 is 3.2 rotated dimensions"),
        ({"head_dim": 15}, "model.rope.share: 1 of head_dim 15 is 15 rotated dimensions"),
        (
            {"rope": {"scaling": {"kind": "llama3", "high_freq_factor": 1}}},
            "model.rope.scaling.high_freq_factor: 1 must be above low_freq_factor, which is 1",
        ),
        ({"rope": {"scaling": {"kind": "linear"}}}, "model.rope.scaling.factor: missing"),
        ({"rope": {"scaling": {"kind": "ntk"}}}, "model.rope.scaling.kind: ntk: this must be one of linear, llama3"),
        (
            {"rope": {"scaling": {"kind": "yarn", "factor": 4, "original_length": 32, "beta_slow": 32}}},
            "model.rope.scaling.beta_fast: 32 must be above beta_slow, which is 32",
        ),
        ({"parallel_residual": True, "norm_place": "output"}, "take norm_place: input"),
        ({"moe": {"experts": 4}, "sub_norm": True}, "model.sub_norm: true: experts have no norm within"),
        ({"latent": LATENT, "kv_heads": 2}, "model.kv_heads: 2: latent attention has keys and values for each head"),
        ({"latent": LATENT, "head_dim": 16}, "model.head_dim: 16: with latent it is plain_dim + rope_dim, 20"),
        ({"latent": LATENT, "rope": {"share": 0.5}}, "model.rope.share: 0.5: latent.rope_dim says"),
        ({"latent": LATENT, "qk_norm": "all_heads"}, "model.qk_norm: all_heads: latent attention normalises"),
        ({"latent": LATENT, "qk_norm": True}, "model.qk_norm: true: latent attention normalises"),
        ({"latent": LATENT, "bias": True}, "model.bias: true: the projections of latent attention have no biases"),
        ({"latent": LATENT, "qkv_bias": True}, "model.qkv_bias: true: the projections of latent attention"),
        (
            {"latent": LATENT, "quantise": {"grid": "ternary"}},
            "model.quantise.parts: attention, mlp, experts: the matrices of latent attention are not quantised",
        ),
        ({"layers": True}, "model.layers: true: this must be a number, not true or false"),
        ({"layers": 2.5}, "model.layers: 2.5: this must be a whole number"),
        ({"layer": 2}, "model.layer: unknown key; did you mean 'model.layers'?"),
        ({"activation": "silu"}, "did you mean 'swiglu'?"),
        ({"norm_eps": float("nan")}, "model.norm_eps: .nan: this must be a finite number"),
    ],
)
def test_wrong_models(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model({**SIZES, **changes})
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_head_dim_frees_hidden_from_heads() -> None:
    assert load_model({**SIZES, "heads": 3, "head_dim": 16}).heads == 3


def test_partial_rotation() -> None:
    assert load_model({**SIZES, "rope": {"share": 0.25}}).rotary_dim == 4


def test_a_model_is_not_shared_by_accident() -> None:
    first, second = load_model("tiny"), load_model("tiny")
    assert first == second
    assert isinstance(first, ModelConfig)
    assert first.name == "tiny"
