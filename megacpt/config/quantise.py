"""Weights of few bits: which matrices are quantised, onto which grid, with how many scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field, model_validator

from megacpt.config.base import Count, Problem, Section, raise_problems

if TYPE_CHECKING:
    from megacpt.config.model import ModelConfig

MatrixPart = Literal["attention", "mlp", "experts"]
CacheForm = Literal["dense", "fp8", "2bit"]
_BITS = {"int": (2, 8), "quest": (1, 7)}
_EXACT_IN_FP8 = 16  # whole numbers up to here have a place in float8 e4m3


class ScaleConfig(Section):
    """How many scales a matrix has, and how they are made and kept."""

    scope: Literal["tensor", "shard", "group"] = Field(
        default="tensor",
        description="What shares a scale: the whole matrix; each of `shards` parts of it, as a model-parallel training "
        "with local scales has them (Spectra); or `group` weights of a row. It belongs to the model and does not "
        "depend on the layout.",
        examples=["tensor", "shard"],
    )
    shards: Count | None = Field(
        default=None,
        ge=1,
        description="For the scope shard: parts of each matrix, cut where tensor parallelism of this size cuts it. "
        "`parallel.tensor` must divide it or be a multiple of it.",
        examples=[2],
    )
    group: Count | None = Field(
        default=None,
        ge=2,
        description="For the scope group: consecutive weights of a row that share a scale. It must divide the input "
        "width of every quantised matrix, and what tensor parallelism leaves of it on a rank.",
        examples=[128],
    )
    rule: Literal["add", "clamp"] = Field(
        default="add",
        description="For the grid ternary: the scale is the mean absolute weight, plus 1e-5 (add: TriLM) or at least "
        "1e-5 (clamp: BitNet b1.58).",
        examples=["add"],
    )
    format: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        description="Scales are rounded to this format before weights are divided by them, so that a file that keeps "
        "them so holds the same function; float16 is that of GGUF.",
        examples=["float16"],
    )

    @model_validator(mode="after")
    def _scope_has_its_size(self) -> ScaleConfig:
        problems = []
        for scope, key, value in (("shard", "shards", self.shards), ("group", "group", self.group)):
            if self.scope == scope and value is None:
                problems.append(
                    Problem(key, f"missing: the scope {scope} needs a number, such as `{key}: {_SIZES[key]}`")
                )
            elif self.scope != scope and value is not None:
                text = f"{value} is for the scope {scope}, and the scope is {self.scope}: remove the key"
                problems.append(Problem(key, text))
        raise_problems(problems)
        return self


_SIZES = {"shards": 2, "group": 128}


class QuantiseConfig(Section):
    """Matrices that are used as a few levels times a scale, and trained through latent weights of full precision.

    The embedding, the output projection, norms, biases and routers are never quantised.
    """

    grid: Literal["ternary", "binary", "int", "quest"] = Field(
        description="The levels of a weight: ternary: -1, 0 and 1 (TriLM, BitNet b1.58); binary: -1 and 1 (BiLM); int: "
        "whole numbers of `bits`, up to the largest weight; quest: `bits` after a Hadamard transform, clipped where "
        "the error of a Gaussian is least (QuEST).",
        examples=["ternary"],
    )
    bits: Count | None = Field(
        default=None,
        ge=1,
        le=8,
        description="Bits of a weight, for the grids int (2 to 8) and quest (1 to 7).",
        examples=[4],
    )
    scale: ScaleConfig = Field(default_factory=ScaleConfig, description="The factors of the levels.")
    parts: list[MatrixPart] = Field(
        default_factory=lambda: list(get_args(MatrixPart)),
        min_length=1,
        description="Which matrices: those of attention (query, key, value, output), of MLPs (shared experts too), and "
        "of routed experts.",
        examples=[["attention", "mlp", "experts"]],
    )
    activations: Literal["none", "int8", "fp8"] = Field(
        default="none",
        description="What quantised matrices are multiplied with: the activations as they are; each token's rounded to "
        "127 levels either side of 0 (int8: BitNet b1.58); or to float8 e4m3 (fp8). The gradient passes straight "
        "through.",
        examples=["none"],
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> QuantiseConfig:
        raise_problems(list(self._problems()))
        return self

    def _problems(self) -> Iterator[Problem]:
        limits = _BITS.get(self.grid)
        if limits is None and self.bits is not None:
            yield Problem("bits", f"{self.bits}: the grid {self.grid} has its own number of levels: remove the key")
        elif limits is not None and (self.bits is None or not limits[0] <= self.bits <= limits[1]):
            given = "missing" if self.bits is None else str(self.bits)
            yield Problem("bits", f"{given}: the grid {self.grid} takes {limits[0]} to {limits[1]}")
        if self.scale.rule == "clamp" and self.grid != "ternary":
            yield Problem("scale.rule", f"clamp is a rule of the grid ternary, not of {self.grid}: take add")
        if self.grid == "quest" and (self.scale.group is None or self.scale.group & (self.scale.group - 1)):
            text = "quest transforms groups of weights: take scale: {scope: group, group: 128}, or another power of 2"
            yield Problem("scale.group", text)
        if len(set(self.parts)) < len(self.parts):
            yield Problem("parts", f"{', '.join(self.parts)}: name each part once")

    @property
    def largest_code(self) -> int:
        """The largest absolute value of a code."""
        if self.bits is None:
            return 1
        return (1 << self.bits) - 1 if self.grid == "quest" else (1 << (self.bits - 1)) - 1

    def cache_problem(self, form: CacheForm) -> str | None:
        """Why codes cannot be kept in the form; None where they can."""
        if form == "2bit" and self.largest_code > 1:
            return f"2bit holds -1, 0 and 1, and the grid {self.grid} has codes up to {self.largest_code}: take dense"
        if form == "fp8" and self.largest_code > _EXACT_IN_FP8:
            return f"fp8 holds codes up to {_EXACT_IN_FP8} exactly, and here they reach {self.largest_code}: take dense"
        return None


def size_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what does not fit the sizes of a model, whatever the layout; keys are relative to the model."""
    if model.quantise is None:
        return
    scale, parts = model.quantise.scale, model.quantise.parts
    if parts == ["experts"] and model.moe is None:
        yield Problem("quantise.parts", "experts: the model has none, so that nothing would be quantised: name others")
    if scale.shards is not None:
        for name, size in _cut(model):
            if size % scale.shards:
                yield Problem("quantise.scale.shards", f"{scale.shards} does not divide {name}, which is {size}")
    if scale.group is not None:
        for name, width, _ in input_widths(model):
            if width % scale.group:
                yield Problem("quantise.scale.group", f"{scale.group} does not divide {name}, which is {width}")


def _cut(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """What shards of quantised matrices hold whole: heads that share keys and values, and channels."""
    assert model.quantise is not None
    if "attention" in model.quantise.parts:
        yield "model.kv_heads", model.kv_heads
    yield from ((name, width) for name, width, inner in input_widths(model) if inner and "heads" not in name)


def input_widths(model: ModelConfig) -> Iterator[tuple[str, int, bool]]:
    """Yield the input widths of quantised matrices: what they are, how many, whether they are of second matrices."""
    assert model.quantise is not None
    parts, moe = model.quantise.parts, model.moe
    yield "model.hidden", model.hidden, False
    if "attention" in parts:
        yield "model.heads * model.head_dim", model.heads * model.head_dim, True
    if "mlp" in parts and not all(model.moe_layers):
        yield "model.ffn", model.ffn, True
    if "mlp" in parts and moe is not None and moe.shared_ffn:
        yield "model.moe.shared_ffn", moe.shared_ffn, True
    if "experts" in parts and moe is not None:
        yield "model.moe.ffn", model.expert_ffn, True


def layout_problems(model: ModelConfig, tensor: int) -> Iterator[Problem]:
    """Yield what does not fit `tensor` tensor-parallel ranks; keys are those of a run."""
    if model.quantise is None:
        return
    scale = model.quantise.scale
    if scale.shards is not None and scale.shards % tensor and tensor % scale.shards:
        valid = [n for n in range(1, model.heads + 1) if scale.shards % n == 0 or n % scale.shards == 0]
        near = [*[n for n in valid if n < tensor][-1:], *[n for n in valid if n > tensor][:1]]
        text = f"{tensor} neither divides model.quantise.scale.shards ({scale.shards}) nor is a multiple of it"
        yield Problem("parallel.tensor", f"{text}: take {' or '.join(map(str, near))}")
    if scale.group is not None:
        for name, width, inner in input_widths(model):
            if inner and "moe.ffn" not in name and width % tensor == 0 and width // tensor % scale.group:
                text = f"{scale.group} does not divide the {width // tensor} columns that each of {tensor} "
                text += f"tensor-parallel ranks has of {name}: take a smaller group, or another parallel.tensor"
                yield Problem("model.quantise.scale.group", text)
