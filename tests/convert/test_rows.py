"""Rules of rows: what is taken apart is put together again, whatever the sizes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import ModelConfig
from megacpt.convert.families import FAMILIES
from megacpt.convert.families.rows import ALL, GATE, KEY, QUERY, UP, VALUE, put
from tests.small import MODEL


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv_heads, shared = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = {"heads": kv_heads * shared, "kv_heads": kv_heads, "head_dim": 2 * draw(st.integers(1, 6))}
    return ModelConfig.model_validate({**MODEL, **sizes, "ffn": draw(st.integers(1, 20))})


@given(models(), st.integers(1, 9), st.integers(1, 5))
def test_parts_make_up_the_whole(model: ModelConfig, rows: int, width: int) -> None:
    fused = (model.heads + 2 * model.kv_heads) * model.head_dim
    for rules, total in (((QUERY, KEY, VALUE), fused), ((GATE, UP), 2 * model.ffn), ((ALL,), fused)):
        whole = torch.randn(total, width)
        made = torch.full((total, width), torch.nan)
        for rule in rules:
            numbers = rule.numbers(model, total)
            part = whole if numbers is None else whole[numbers]
            assert len(part) == rule.count(model, total)
            for first in range(0, len(part), rows):
                put(made, numbers, first, part[first : first + rows])
        assert torch.equal(made, whole)


@given(models())
def test_heads_stay_whole_and_in_order(model: ModelConfig) -> None:
    total = (model.heads + 2 * model.kv_heads) * model.head_dim
    for rule, heads in ((QUERY, model.heads), (KEY, model.kv_heads), (VALUE, model.kv_heads)):
        numbers = rule.numbers(model, total)
        assert numbers is not None
        each = numbers.view(heads, model.head_dim)
        assert torch.equal(each - each[:, :1], torch.arange(model.head_dim).expand_as(each))
        assert (each[1:, 0] > each[:-1, 0]).all()


@given(models(), st.integers(1, 3), st.integers(1, 300), st.sampled_from(["llama", "qwen2", "qwen3"]))
def test_every_row_of_ours_comes_from_one_of_theirs(model: ModelConfig, layers: int, words: int, name: str) -> None:
    biases = {"qkv_bias": name == "qwen2", "qk_norm": name == "qwen3"}
    model = ModelConfig.model_validate({**model.model_dump(), **biases, "layers": layers})
    for source in FAMILIES[name].sources(model, words + 7, words):
        taken = torch.zeros(source.rows, dtype=torch.int64)
        for target in source.targets:
            numbers = target.rows.numbers(model, source.rows)
            taken[: target.shape[0]] += 1 if numbers is None else 0
            if numbers is not None:
                taken[numbers] += 1
        padded = source.rows == words + 7 and source.layer is None and source.name != "decoder.final_layernorm.weight"
        assert taken[: words if padded else source.rows].eq(1).all()
        assert not padded or not taken[words:].any()
