from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.yaml_text import inline, parse_document, parse_value, read_document, write_yaml
from megacpt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("3.0e-4", 3e-4),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("-3", -3),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("20M", "20M"),
        ("1%", "1%"),
        ("0x10", "0x10"),
        ("'3e-4'", "3e-4"),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("{a: 1, b: [x, 2]}", {"a": 1, "b": ["x", 2]}),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(parse_value(".nan"))


def test_keys_are_text() -> None:
    assert parse_document("no: 1\n2024: 2\n010: 3\ntrue: 4\n", "x").data == {"no": 1, "2024": 2, "010": 3, "true": 4}


def test_places() -> None:
    document = parse_document("a: 1\nb:\n  c: 2\n  d: {e: 3}\n", "run.yaml")
    assert document.places == {
        ("a",): "run.yaml:1",
        ("b",): "run.yaml:2",
        ("b", "c"): "run.yaml:3",
        ("b", "d"): "run.yaml:4",
        ("b", "d", "e"): "run.yaml:4",
    }


def test_anchors_and_merges() -> None:
    data = parse_document("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", "x").data
    assert data["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\nc: 2\n", r"^f\.yaml:3:2: this is not valid YAML: .*expected ',' or '\]'"),
        ("a: b: c\n", r"^f\.yaml:1:5: .*put a text that contains ': ' in quotes"),
        ("a:\n\tb: 1\n", r"^f\.yaml:2:1: .*spaces, not tabs"),
        ("a: 'x\n", r"^f\.yaml:2:1: "),
        ("a: !!python/object:os.system x\n", r"^f\.yaml:1:4: .*could not determine a constructor"),
        ("a: &a [*a]\n", r"^f\.yaml:1:4: .*an anchor contains itself"),
        ("? [1]\n: 2\n", r"^f\.yaml:1:3: .*a key must be text"),
        ("a: 1\n---\nb: 2\n", r"^f\.yaml:2:1: "),
        ("a: \x00\n", r"^f\.yaml: this is not valid YAML"),
        ("", r"^f\.yaml is empty"),
        ("# only a comment\n", r"^f\.yaml is empty"),
        ("- 1\n", r"must hold keys and values, such as `tokens: 20M`, not a list"),
        ("tiny\n", "not a text"),
        ("3\n", "not a number"),
    ],
)
def test_what_is_not_a_document(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_document(text, "f.yaml")


def test_repeated_keys_are_all_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document("a: 1\nb: {c: 1, c: 2}\na: 3\n", "f.yaml")
    assert str(caught.value).splitlines() == [
        "f.yaml:2: c: this key was given before, in line 2: remove one",
        "f.yaml:3: a: this key was given before, in line 1: remove one",
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: 1\n")
    (tmp_path / "latin.yaml").write_bytes("a: \xe4\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"rum\.yaml does not exist; did you mean 'run\.yaml'\?"):
        read_document(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match=r"its folder .*nowhere does not exist either"):
        read_document(tmp_path / "nowhere" / "run.yaml")
    with pytest.raises(ConfigError, match=r"is a folder: did you mean .*run\.yaml\?"):
        read_document(tmp_path)
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 3\)"):
        read_document(tmp_path / "latin.yaml")


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_document(tmp_path / "run.yaml").data == {"a": 1}


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
)


@given(
    st.recursive(
        scalars, lambda inner: st.dictionaries(st.text("abc01no.-", min_size=1), inner, max_size=3), max_leaves=6
    )
)
def test_what_is_written_reads_back(value: Any) -> None:
    assert parse_document(write_yaml({"x": value}), "x").data == {"x": value}
    assert parse_value(inline(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_numbers_for_other_readers_too(value: float) -> None:
    assert yaml.safe_load(write_yaml({"x": value})) == {"x": value}


@pytest.mark.parametrize("word", ["no", "on", "3e-4", "12:30", "2024-01-31", "~", "1_000"])
def test_words_are_words_for_other_readers_too(word: str) -> None:
    assert yaml.safe_load(write_yaml({"x": word})) == {"x": word}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3e-4, "3.0e-4"),
        (1.65e-4, "1.65e-4"),
        (1e-8, "1.0e-8"),
        (0.1, "0.1"),
        (10.0, "10.0"),
        (0.0, "0.0"),
        (1e20, "1.0e+20"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert inline(value) == text
