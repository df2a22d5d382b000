import io
import json
import random
import tracemalloc
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.parquet_files import AudioCell, AudioColumn, ParquetCells, audio_column, read_footer
from tests.containers import AUDIO, audio_table

CELLS = st.lists(
    st.tuples(st.none() | st.binary(max_size=50), st.none() | st.text(max_size=5)), min_size=1, max_size=30
)


def written(table: Any, **options: Any) -> io.BytesIO:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink


@given(cells=CELLS, group_size=st.integers(1, 12), seed=st.integers())
def test_every_cell_is_read_in_whatever_order(
    cells: list[tuple[bytes | None, str | None]], group_size: int, seed: int
) -> None:
    rows = list(range(len(cells)))
    for order in (rows, random.Random(seed).choices(rows, k=len(rows))):
        reader = ParquetCells(written(audio_table(cells), row_group_size=group_size), "audio")
        assert [reader.read(row) for row in order] == [AudioCell(data=cells[r][0], path=cells[r][1]) for r in order]


@given(cells=CELLS, group_size=st.integers(1, 12))
def test_the_footer_counts_the_rows(cells: list[tuple[bytes | None, str | None]], group_size: int) -> None:
    table = read_footer(written(audio_table(cells), row_group_size=group_size))
    assert sum(num_rows for num_rows, _ in table.row_groups) == len(cells)
    assert table.columns == ("text", "audio")
    assert table.audio == AudioColumn(name="audio", holds_bytes=any(data is not None for data, _ in cells))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_plain_column_of_bytes_or_paths(kind: Any) -> None:
    reader = ParquetCells(written(pa.table({"file": pa.array([b"x", None], kind)})), "file")
    assert [reader.read(0), reader.read(1)] == [AudioCell(data=b"x"), AudioCell()]
    reader = ParquetCells(written(pa.table({"path": ["a.wav", None]})), "path")
    assert [reader.read(0), reader.read(1)] == [AudioCell(path="a.wav"), AudioCell()]


@pytest.mark.parametrize("row", [-1, 3, 10**9])
def test_a_row_that_is_not_there_is_told(row: int) -> None:
    reader = ParquetCells(written(audio_table([(b"x", None)] * 3)), "audio")
    with pytest.raises(LookupError):
        reader.read(row)
    with pytest.raises(LookupError):
        ParquetCells(written(audio_table([(b"x", None)])), "other")


@pytest.mark.parametrize(
    ("fields", "marked", "name"),
    [
        ({"recording": AUDIO, "audio": AUDIO}, ("recording",), "recording"),
        ({"a": pa.string(), "audio": AUDIO}, (), "audio"),
        ({"path": pa.string(), "file": pa.binary()}, (), "file"),
        ({"path": pa.large_string()}, (), "path"),
        ({"audio": pa.int64(), "path": pa.string()}, (), "path"),  # a number of that name leads nowhere
        ({"audio": pa.struct([("array", pa.list_(pa.float32()))])}, (), None),
        ({"text": pa.string(), "bytes": pa.binary()}, (), None),
    ],
)
def test_the_audio_column_is_the_one_marked_else_the_one_so_named(
    fields: dict[str, Any], marked: tuple[str, ...], name: str | None
) -> None:
    features = {one: {"_type": "Audio" if one in marked else "Value"} for one in fields}
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    found = audio_column(schema)
    assert (found.name if found else None) == name
    if not marked:
        for metadata in (None, {"huggingface": "no json"}, {"huggingface": "[]"}, {"huggingface": '{"info": {}}'}):
            assert audio_column(pa.schema(fields, metadata=metadata)) == found


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "footer"])
def test_what_is_no_parquet_file_is_told_as_damage(damage: str) -> None:
    data = written(audio_table([(b"x" * 100, None)] * 5)).getvalue()
    damaged = {
        "cut": data[:-20],
        "text": b"not parquet",
        "empty": b"",
        "footer": data[:-100] + b"\xff" * 80 + data[-20:],
    }[damage]
    with pytest.raises(pa.ArrowInvalid):
        read_footer(io.BytesIO(damaged))


def test_memory_holds_a_page_and_not_a_row_group() -> None:
    size_bytes, num_rows = 100_000, 200
    file = written(audio_table([(bytes([row]) * size_bytes, None) for row in range(num_rows)]), write_batch_size=4)
    reader = ParquetCells(file, "audio")
    pool = pa.default_memory_pool()
    before, highest = pool.bytes_allocated(), 0
    tracemalloc.start()
    for row in range(num_rows):
        assert reader.read(row).data == bytes([row]) * size_bytes
        highest = max(highest, pool.bytes_allocated() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 20 MB in all. Eight cells at a time, a page of about 1 MB, and what the reader asks for ahead (4 MiB).
    assert highest + peak < 10_000_000


def test_damage_and_a_storage_that_fails_are_told_apart() -> None:
    data = bytearray(written(audio_table([(bytes(1000), None)] * 50), row_group_size=10, compression="zstd").getvalue())
    broken = pq.read_metadata(io.BytesIO(data)).row_group(2).column(1)
    start = broken.data_page_offset if broken.dictionary_page_offset is None else broken.dictionary_page_offset
    data[start : start + broken.total_compressed_size] = b"\xff" * broken.total_compressed_size
    reader = ParquetCells(io.BytesIO(data), "audio")
    assert reader.read(19).data == bytes(1000)
    for _ in range(2):
        with pytest.raises(pa.ArrowInvalid):
            reader.read(25)
    assert reader.read(30).data == bytes(1000)

    class Failing(io.BytesIO):
        is_gone = False

        def read(self, size: int | None = -1, /) -> bytes:
            if self.is_gone:
                raise OSError("connection lost")
            return super().read(size)

    file = Failing(written(audio_table([(bytes(1000), None)] * 50), row_group_size=10, compression="none").getvalue())
    reader = ParquetCells(file, "audio")
    reader.read(0)
    file.is_gone = True
    with pytest.raises(OSError, match="connection lost"):
        reader.read(45)
