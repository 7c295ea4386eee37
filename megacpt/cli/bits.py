"""``megacpt convert bits``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megacpt.convert.bits import TensorBits


def bits(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint or a run folder, a folder of `convert pack`, or a model: a name from configs/models or "
            "a YAML file.",
        ),
    ],
    ternary: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="Of a ternary weight; its information, log2(3) = 1.585, if left out."),
    ] = None,
    plain: Annotated[
        float | None, typer.Option(metavar="BITS", help="Of a weight that is not quantised; 16 if left out.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Count the bits of a model, tensor by tensor: weights, scales, embedding and head.

    Of a packed folder it counts what is stored; of a checkpoint or a model, what their weights take in the forms that
    --ternary and --plain say. The column "scales" is the part of "bits each" that they take.

    Examples:
      megacpt convert bits packed
      megacpt convert bits runs/ternary --ternary 2 --json bits.json
      megacpt convert bits spectra-floatlm-99m
    """
    from megacpt.data.files import write_json

    found = _count_bits(path, ternary, plain)
    _show_bits(found)
    if json_file is not None:
        total = sum(one.bits for one in found)
        write_json(json_file, {"path": path, "bits": total, "tensors": [vars(one) for one in found]})


def _count_bits(path: str, ternary: float | None, plain: float | None) -> list[TensorBits]:
    """Open what the path means."""
    from megacpt.config import load_model
    from megacpt.convert.bits import INFORMATION, bits_of_checkpoint, bits_of_folder, bits_of_model
    from megacpt.convert.packed_folder import PackedFolder, is_packed_folder
    from megacpt.errors import ConfigError

    folder = Path(path)
    if is_packed_folder(folder):
        for option, given in (("--ternary", ternary), ("--plain", plain)):
            if given is not None:
                raise ConfigError(f"{option} is for checkpoints and models: a packed folder stores what it stores")
        return bits_of_folder(PackedFolder(folder))
    width, other = INFORMATION if ternary is None else ternary, 16.0 if plain is None else plain
    if folder.is_dir():
        return bits_of_checkpoint(folder, other, width)
    return bits_of_model(load_model(path), plain=other, ternary=width)


def _show_bits(found: list[TensorBits]) -> None:
    """Print a table, and the whole below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    whole, weights = sum(one.bits for one in found), sum(one.weights for one in found)
    table = Table(show_footer=True, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("tensor", "all", no_wrap=True)
    for title, footer in (
        ("weights", f"{weights:,}"),
        ("bits each", f"{whole / weights:.4f}"),
        ("scales", f"{sum(one.scale_bits for one in found) / weights:.4f}"),
        ("Mbit", f"{whole / 1e6:,.2f}"),
        ("share", "100.0%"),
    ):
        table.add_column(title, footer, justify="right", no_wrap=True)
    for one in found:
        name = one.name.removesuffix(".weight").removeprefix("model.").removeprefix("layers.*.")
        each, scales, share = one.bits / one.weights, one.scale_bits / one.weights, one.bits / whole
        cells = (f"{one.weights:,}", f"{each:.4f}", f"{scales:.4f}", f"{one.bits / 1e6:,.2f}", f"{share:.1%}")
        table.add_row(name, *cells)
    Console().print(table)
