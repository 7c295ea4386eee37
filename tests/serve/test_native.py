"""The compiled step of the decoder: what torch's operations give, and the same bits on all threads and processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacpt.errors import SetupError
from megacpt.ops.packed_linear_cpu import VARIANTS, best_variant
from megacpt.serve.decoder import Decoder
from megacpt.serve.linear import Activations
from megacpt.serve.native import decode_step, native_step
from tests.serve.llama import MadeUp, model_config
from tests.serve.test_decoder import MODELS, TOKENS, WEIGHTS, close

ODD: dict[str, Any] = {
    "hidden": 70,
    "ffn": 90,
    "head_dim": 18,
    "heads": 3,
    "kv_heads": 1,
    "vocab_multiple": 1,
    "vocab_size": 81,
}
SHAPES = {
    **{name: (changes, {}) for name, changes in MODELS.items()},
    **{name: ({}, how) for name, how in WEIGHTS.items()},
}
SHAPES["odd sizes"] = (ODD, {"columns": 2})


def decoded(decoder: Decoder) -> torch.Tensor:
    cache = decoder.cache()
    return torch.stack([decoder.feed([token], cache) for token in TOKENS])


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_gives_what_torch_gives(name: str, activations: Activations) -> None:
    changes, how = SHAPES[name]
    source = MadeUp(model_config(**changes), **how)
    native, plain = Decoder(source, activations), Decoder(source, activations, native=False)
    # A rounding of the last bit may move an activation to the next of 127 levels.
    close(decoded(native), decoded(plain), 2e-6 if activations == "float" else 1e-2)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", ["qk_norm", "half embeddings", "plain half mlp", "odd sizes"])
def test_threads_and_instruction_sets_change_no_bit(name: str, activations: Activations) -> None:
    changes, how = SHAPES[name]
    decoder = Decoder(MadeUp(model_config(**changes), **how), activations)
    found, threads = {}, torch.get_num_threads()
    try:
        for isa in range(best_variant() + 1):
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                step, cache = decode_step(decoder, isa), decoder.cache()
                logits = [step(token, at, cache.keys, cache.values) for at, token in enumerate(TOKENS)]
                found[f"{VARIANTS[isa]}, {count} threads"] = torch.stack([*logits])
    finally:
        torch.set_num_threads(threads)
    first, *others = found
    assert all(torch.equal(found[first], found[other]) for other in others)


def test_what_would_leave_its_memory_is_refused() -> None:
    decoder = Decoder(MadeUp(model_config()))
    step, cache = decode_step(decoder), decoder.cache(4)
    for token, position in ((96, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(IndexError, match=f"token {token} of 96 at position {position} of 4"):
            step(token, position, cache.keys, cache.values)


def test_the_mode_of_kernels_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(MadeUp(model_config()))
    assert native_step(decoder) is not None
    monkeypatch.setenv("MEGACPT_KERNELS", "reference")
    assert native_step(decoder) is None
    monkeypatch.setenv("MEGACPT_KERNELS", "native")
    monkeypatch.setattr("megacpt.serve.native.decode_step", _missing)
    with pytest.raises(SetupError, match="no compiler"):
        native_step(decoder)


def test_without_kernels_it_says_so_and_runs_on_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megacpt.serve.native.decode_step", _missing)
    source = MadeUp(model_config())
    found = decoded(Decoder(source))
    assert "decoding runs on torch" in caplog.text
    assert torch.equal(found, decoded(Decoder(source, native=False)))


def _missing(*_: object) -> None:
    raise SetupError("no compiler")
