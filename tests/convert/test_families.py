"""Models that transformers made compute the same here, in every layout, and go back as they came."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.convert.exports import export
from tests.convert.hf_models import EXPERTS, FAMILIES, MODELS, VOCAB, greedy, loaded, logits, save, tensors
from tests.pool import Pools

pytest.importorskip("transformers", reason="the package transformers (extra hf) makes the models to convert")
CASES = "tests.convert.hf_cases"
DRAW = np.random.default_rng(5)
# Sequence parallelism splits them; the longest reaches over several periods of all wavelengths of a head.
PROMPTS = [DRAW.integers(0, VOCAB, length).tolist() for length in (6, 40, 96)]
LAYOUTS: dict[str, list[str]] = {
    "tensor": ["parallel.tensor=2"],
    "tensor-experts": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2"],
    "experts": ["parallel.expert=2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def run_of(pools: Pools, folder: Path) -> dict[str, Path]:
    """Runs by name, made when first asked for."""

    class Runs(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = folder / f"{name}-run"
            export(pools, "from_hf", save(name, folder / name), self[name], tokenizer="bytes")
            return self[name]

    return Runs()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    pools: Pools, run_of: dict[str, Path], folder: Path, name: str
) -> None:
    run, model = str(run_of[name]), loaded(folder / name)
    found = pools(1).run(f"{CASES}:logits", checkpoint=run, prompts=PROMPTS, overrides=[])[0]
    for prompt, one in zip(PROMPTS, found, strict=True):
        np.testing.assert_allclose(one, logits(model, prompt), atol=1e-4)
    tokens = pools(1).run(f"{CASES}:greedy", checkpoint=run, prompt=PROMPTS[1], count=32, rows=VOCAB)[0]
    assert tokens == greedy(model, PROMPTS[1], 32)
    assert len(set(tokens)) > 1


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, layout) for name in FAMILIES if name not in EXPERTS for layout in ("tensor", "pipeline")),
        *((name, layout) for name in EXPERTS for layout in ("tensor-experts", "pipeline", "experts")),
    ],
)
def test_in_every_layout(pools: Pools, run_of: dict[str, Path], folder: Path, name: str, layout: str) -> None:
    case = {"checkpoint": str(run_of[name]), "prompts": PROMPTS, "overrides": LAYOUTS[layout]}
    ranks = pools(2).run(f"{CASES}:logits", **case)
    model = loaded(folder / name)
    assert ranks[-1] is not None
    for found in ranks:
        for prompt, one in zip(PROMPTS, found or [], strict=found is not None):
            np.testing.assert_allclose(one, logits(model, prompt), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_goes_back_bit_by_bit(pools: Pools, run_of: dict[str, Path], folder: Path, name: str, tmp_path: Path) -> None:
    export(pools, "to_hf", run_of[name], tmp_path / "back", shard_bytes=50_000)
    came, gone = tensors(folder / name), tensors(tmp_path / "back")
    assert came.keys() == gone.keys()
    assert not [word for word in came if not torch.equal(came[word], gone[word])]
    before, after = loaded(folder / name), loaded(tmp_path / "back")
    assert type(before) is type(after)
    np.testing.assert_array_equal(logits(after, PROMPTS[2]), logits(before, PROMPTS[2]))
