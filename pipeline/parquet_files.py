"""Parquet files that hold or name audio, as Hugging Face `datasets` writes them: which column, and cell by cell."""

import io
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_COLUMN_NAMES = ("audio", "file", "path")
_MAGIC_BYTES = 8  # at the end: four of the footer's size, four that say PAR1
_BATCH_ROWS = 8  # cells are up to tens of megabytes; more rows at a time would only fill memory
_STREAM_BYTES = 4 * 1024 * 1024  # of a column chunk at a time; pages are decoded one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioColumn:
    """The column of a Parquet file that leads to audio."""

    name: str
    holds_bytes: bool  # False: only paths, as far as the footer says


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioTable:
    """What the footer of a Parquet file says."""

    columns: tuple[str, ...]
    audio: AudioColumn | None
    row_groups: tuple[tuple[int, int | None], ...]  # rows, and the mean bytes of one audio cell


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioCell:
    """A cell of an audio column: the encoded bytes, else the path of a file, else nothing."""

    data: bytes | None = None
    path: str | None = None


def read_footer(file: BinaryIO) -> AudioTable:
    """What a Parquet file holds, from its footer alone.

    Raises:
        pa.ArrowInvalid: it is damaged, or no Parquet file.
    """
    metadata = _metadata(file)
    schema = metadata.schema.to_arrow_schema()
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    audio = audio_column(schema)
    if audio is not None and not any(_may_hold_bytes(group, audio) for group in groups):
        audio = AudioColumn(name=audio.name, holds_bytes=False)
    return AudioTable(
        columns=tuple(schema.names),
        audio=audio,
        row_groups=tuple((group.num_rows, _mean_bytes(group, audio)) for group in groups),
    )


def audio_column(schema: Any) -> AudioColumn | None:
    """The column that `datasets` marks as Audio, else the one named audio, file or path; None if there is none."""
    for name in (*_marked(schema), *_COLUMN_NAMES):
        kind = schema.field(name).type if schema.names.count(name) == 1 else None
        if kind is None:
            continue
        if pa.types.is_struct(kind):
            fields = {field.name: field.type for field in kind}
            if _is_bytes(fields.get("bytes")) or _is_text(fields.get("path")):
                return AudioColumn(name=name, holds_bytes=_is_bytes(fields.get("bytes")))
        elif _is_bytes(kind) or _is_text(kind):
            return AudioColumn(name=name, holds_bytes=_is_bytes(kind))
    return None


def _metadata(file: BinaryIO) -> Any:
    """The footer. Read first and then parsed, so that what the storage raises cannot be taken for damage."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _MAGIC_BYTES))
    tail = file.read(_MAGIC_BYTES)
    size_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or size_bytes > end - _MAGIC_BYTES:
        raise pa.ArrowInvalid("it does not end as a Parquet file does")
    file.seek(end - _MAGIC_BYTES - size_bytes)
    footer = file.read(size_bytes)
    try:
        return pq.read_metadata(io.BytesIO(b"PAR1" + footer + tail))
    except OSError as error:
        raise pa.ArrowInvalid(str(error)) from None


class ParquetCells:
    """Reads audio cells by row number; rows in ascending order cost one pass over their row groups.

    Of a row group, the pages of one column are decoded as they are reached; memory holds a page and a few cells.
    """

    def __init__(self, file: BinaryIO, column: str) -> None:
        """Raises pa.ArrowInvalid where the file is damaged, and LookupError where it has no such column."""
        self._watched = _Watched(file)
        self._file = pq.ParquetFile(
            self._watched, metadata=_metadata(file), pre_buffer=False, buffer_size=_STREAM_BYTES
        )
        self._column = column
        if column not in self._file.schema_arrow.names:
            raise LookupError(column)
        metadata = self._file.metadata
        sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._starts: Sequence[int] = [0, *accumulate(sizes)]  # of the row groups; the last is the end
        self._cells: Iterator[AudioCell] = iter(())
        self._next_row, self._end = 0, 0

    def read(self, row: int) -> AudioCell:
        """Raises LookupError where the file does not have that many rows, pa.ArrowInvalid where it is damaged."""
        if not 0 <= row < self._starts[-1]:
            raise LookupError(row)
        if not self._next_row <= row < self._end:
            group = bisect_right(self._starts, row) - 1
            self._next_row, self._end = self._starts[group], self._starts[group + 1]
            self._cells = self._read_group(group)
        try:
            for _ in range(row - self._next_row):
                next(self._cells)
            cell = next(self._cells)
        except OSError as error:  # pyarrow calls some kinds of damage so
            self._end = 0
            if self._watched.has_failed:
                raise
            raise pa.ArrowInvalid(str(error)) from None
        self._next_row = row + 1
        return cell

    def _read_group(self, group: int) -> Iterator[AudioCell]:
        batches = self._file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False
        )
        for batch in batches:
            for value in batch.column(0):
                yield _cell(value.as_py())


class _Watched(io.BufferedIOBase):
    """A file that remembers whether reading it failed: then it was the storage, and not what is in the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.has_failed = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return self._file.read(-1 if size is None else size)
        except OSError:
            self.has_failed = True
            raise


def _cell(value: Any) -> AudioCell:
    if isinstance(value, dict):
        return AudioCell(data=value.get("bytes"), path=value.get("path"))
    return AudioCell(path=value) if isinstance(value, str) else AudioCell(data=value)


def _marked(schema: Any) -> list[str]:
    """The columns that the `huggingface` key of the schema calls Audio."""
    metadata: dict[bytes, bytes] = schema.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return [name for name, feature in features.items() if feature["_type"] == "Audio"]
    except (KeyError, TypeError, ValueError, AttributeError):  # no such key, or not as `datasets` writes it
        return []


def _is_bytes(kind: Any) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _mean_bytes(group: Any, audio: AudioColumn | None) -> int | None:
    """Of an audio cell in this row group; None where only paths are known."""
    if audio is None or not audio.holds_bytes or not group.num_rows:
        return None
    return sum(chunk.total_uncompressed_size for chunk in _byte_chunks(group, audio)) // group.num_rows


def _may_hold_bytes(group: Any, audio: AudioColumn) -> bool:
    """Whether not all cells of a row group are said to be null; `datasets` has the field for bytes also without any."""
    chunks = [chunk for chunk in _byte_chunks(group, audio) if audio.holds_bytes]
    stats = [(chunk.statistics, chunk.num_values) for chunk in chunks]
    return any(found is None or not found.has_null_count or found.null_count < count for found, count in stats)


def _byte_chunks(group: Any, audio: AudioColumn) -> list[Any]:
    chunks = [group.column(index) for index in range(group.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema in (audio.name, f"{audio.name}.bytes")]
