"""Bits are counted as papers count them, and as files store them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megacpt.config import ModelConfig, load_model
from megacpt.convert.bits import bits_of_folder, bits_of_model
from megacpt.convert.packed_folder import PackedFolder
from tests.cli.command import megacpt as command
from tests.convert.exports import TERNARY, ask, export, trained
from tests.pool import Pools
from tests.small import MODEL, make_stream

# Kaushal et al. 2024 (arXiv 2407.12327), table of the suite: 10^9 bits of FloatLM and TriLM.
SPECTRA = {
    "99m": (1.60, 0.90),
    "190m": (3.05, 1.42),
    "390m": (6.28, 2.11),
    "560m": (9.11, 2.76),
    "830m": (13.34, 3.55),
    "1.1b": (18.39, 4.42),
    "1.5b": (24.23, 5.36),
    "2.4b": (39.38, 7.23),
    "3.9b": (63.83, 10.76),
}


def total(model: ModelConfig) -> float:
    """Bits, of a ternary weight as the paper counts them."""
    return sum(one.bits for one in bits_of_model(model, ternary=1.58))


@pytest.mark.parametrize("size", SPECTRA)
def test_the_table_of_spectra(size: str) -> None:
    float_bits, ternary_bits = SPECTRA[size]
    # The paper writes some sums rounded, and some cut.
    assert total(load_model(f"spectra-floatlm-{size}")) / 1e9 == pytest.approx(float_bits, abs=0.0075)
    assert total(load_model(f"spectra-trilm-{size}")) / 1e9 == pytest.approx(ternary_bits, abs=0.0075)


def test_every_weight_is_counted() -> None:
    model = ModelConfig.model_validate({**MODEL, "bias": True, "qk_norm": True, "vocab_size": 100})
    counted = bits_of_model(model)
    assert sum(one.weights for one in counted) == model.parameters()
    assert sum(one.bits for one in counted) == 16 * model.parameters()


@pytest.mark.parametrize(
    ("grid", "code", "scales"),
    [
        ({"grid": "ternary"}, 1.58, 32 / (128 * 128)),
        ({"grid": "binary", "scale": {"scope": "shard", "shards": 4, "format": "float16"}}, 1, 4 * 16 / (128 * 128)),
        ({"grid": "int", "bits": 3, "scale": {"scope": "group", "group": 64, "format": "float16"}}, 3, 16 / 64),
        ({"grid": "quest", "bits": 4, "scale": {"scope": "group", "group": 32}}, 4, 32 / 32),
    ],
)
def test_scales_are_counted_beside_codes(grid: dict[str, object], code: float, scales: float) -> None:
    sizes = {"layers": 3, "hidden": 128, "ffn": 256, "heads": 4, "vocab_size": 128}
    model = ModelConfig.model_validate({**sizes, "quantise": grid})
    found = {one.name: one for one in bits_of_model(model, ternary=1.58)}
    output = found["model.layers.*.self_attn.o_proj.weight"]
    assert output.weights == 3 * 128 * 128
    assert output.code_bits / output.weights == pytest.approx(code)
    assert output.scale_bits / output.weights == pytest.approx(scales)
    assert found["lm_head.weight"].bits == 128 * 128 * 16
    # One scale for a fused matrix is one scale, however many names its parts have.
    fused = sum(found[f"model.layers.*.self_attn.{part}_proj.weight"].scale_bits for part in "qkv")
    assert fused == pytest.approx(output.scale_bits * (3 if "int" in str(grid) or "quest" in str(grid) else 1))


@pytest.fixture(scope="module")
def ternary(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ternary")
    stream = make_stream(folder / "streams", "english")
    return trained(pools, folder / "run", str(stream), model={"quantise": TERNARY})


def test_a_folder_is_counted_as_it_is_stored(pools: Pools, ternary: Path, tmp_path: Path) -> None:
    export(pools, "pack", ternary, tmp_path / "packed", dtype="bfloat16")
    found = bits_of_folder(PackedFolder(tmp_path / "packed"))
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(one.bits for one in found) == 8 * (file.stat().st_size - header)
    # A row of 32 or 48 codes is whole bytes of four, so that only the copies of shared scales differ from the count.
    counted = ask(pools, "checkpoint_bits", checkpoint=str(ternary), ternary=2.0)
    assert sum(one.code_bits for one in found) + 16 * 4 * 2 == counted


def test_the_command_counts_a_name_a_checkpoint_and_a_folder(ternary: Path, tmp_path: Path) -> None:
    done = command("convert", "bits", "spectra-floatlm-99m", "--json", "bits.json", folder=tmp_path)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "bits.json").read_text())["bits"] == pytest.approx(1.596e9, rel=1e-3)
    assert "lm_head" in done.out
    counted = command("convert", "bits", ternary, "--ternary", "1.6", folder=tmp_path)
    assert counted.status == 0, counted.err
    assert "2.0000" not in counted.out
    assert command("convert", "pack", ternary, "--out", "packed", folder=tmp_path).status == 0
    assert command("convert", "bits", "packed", folder=tmp_path).status == 0
    for option in ("--ternary", "--plain"):
        wrong = command("convert", "bits", "packed", option, "2", folder=tmp_path)
        assert wrong.status == 2
        assert f"{option} is for checkpoints and models: a packed folder stores what it stores" in wrong.err
    unknown = command("convert", "bits", "spectra-floatlm-98m", folder=tmp_path)
    assert unknown.status == 2
    assert "did you mean 'spectra-floatlm-99m'" in unknown.err
