"""A stream of 10^12 tokens costs no more to open than one of ten; its files are sparse, and real."""

from __future__ import annotations

import random
import resource
import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megacpt.data.plan import Phase, Segment, Source, StagePlan, Subset
from megacpt.data.stage_data import StageData
from megacpt.data.stream import StreamMeta, TokenStream

TOKENS, DOCUMENTS = 10**12, 10**9
LENGTH = 4096


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A folder with 2 TB of ids and 20 GB of index, of which only the ends are written."""
    folder = tmp_path / "huge"
    folder.mkdir()
    with (folder / "huge.bin").open("wb") as file:
        file.truncate(2 * TOKENS)
        file.seek(2 * (TOKENS - 1))
        file.write(struct.pack("<H", 7))
    length = TOKENS // DOCUMENTS
    with (folder / "huge.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, DOCUMENTS, DOCUMENTS + 1))
        file.seek(34 + 4 * (DOCUMENTS - 1))
        file.write(struct.pack("<i", length))
        file.seek(34 + 4 * DOCUMENTS + 8 * (DOCUMENTS - 1))
        file.write(struct.pack("<q", 2 * (TOKENS - length)))
        file.seek(34 + 12 * DOCUMENTS + 8 * DOCUMENTS)
        file.write(struct.pack("<q", DOCUMENTS))
    meta = StreamMeta(
        "huge", "huge", "bytes", "0" * 64, 257, 256, DOCUMENTS, TOKENS, TOKENS, "uint16", "1" * 64, [], {}
    )
    meta.write(folder)
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 1 << 20
    return folder


def plan(folder: Path, *sources: Source) -> StagePlan:
    new = Source("huge", str(folder), "1" * 64, "new", None, 0.75, (Segment(5, LENGTH, 0, None),))
    consumed = (Segment(6, LENGTH, 3, 10**7), Segment(7, 2 * LENGTH, 0, 10**8))
    seen = Source("again", str(folder), "1" * 64, "replay", "seen", 0.25, consumed)
    return StagePlan(LENGTH, 1, (new, seen, *sources))


def test_opening_and_locating_take_milliseconds_and_little_memory(huge: Path) -> None:
    StageData(plan(huge))  # builds the mixture pattern, which all stages of these weights share
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    begin = time.process_time()
    data = StageData(plan(huge))
    places = [random.Random(0).randrange(10**9) for _ in range(100)]
    samples = [data.tokens(g) for g in places]
    seconds = time.process_time() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(sample.shape == (LENGTH + 1,) for sample in samples)
    assert seconds < 0.5
    assert peak < 100 * LENGTH * 8 + (2 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_the_first_batch_is_there_in_less_than_a_second(huge: Path) -> None:
    subset = Segment(5, LENGTH, 0, None, Subset(10**7))
    chosen = Source("chosen", str(huge), "1" * 64, "new", None, 0.31, (subset,))
    phased = replace(plan(huge, chosen), phases=(Phase(4, (0.3, 0.21, 0.49)), Phase(10**9, (1, 1, 1), 10**8)))
    begin = time.process_time()
    assert StageData(phased).batch(0, 8).shape == (8, LENGTH + 1)
    assert time.process_time() - begin < 1


def test_locating_is_much_faster_than_any_model(huge: Path) -> None:
    data = StageData(plan(huge))
    data.locate_many(np.arange(1024))
    fastest = 1.0
    for step in range(50):
        begin = time.process_time()
        data.locate_many(np.arange(1024) + 1024 * step)
        fastest = min(fastest, time.process_time() - begin)
    assert 1024 / fastest > 200_000


def test_samples_are_spread_over_the_whole_stream(huge: Path) -> None:
    data = StageData(plan(huge))
    offsets = [data.locate(g).offset for g in range(2000) if data.locate(g).source == 0]
    assert max(offsets) <= TOKENS - LENGTH - 1
    assert len(set(offsets)) == len(offsets)
    tenths = [0] * 10
    for offset in offsets:
        tenths[offset * 10 // TOKENS] += 1
    assert min(tenths) > 100


def test_the_last_token_and_the_last_document_are_reached(huge: Path) -> None:
    stream = TokenStream.open(huge)
    assert (stream.tokens, stream.documents) == (TOKENS, DOCUMENTS)
    assert stream.read(TOKENS - 2, 2).tolist() == [0, 7]
    assert (huge / "huge.bin").stat().st_size == 2 * TOKENS
