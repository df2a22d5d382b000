"""Small tars, Parquet files and manifests made at test time."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def tar(files: Sequence[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as writer:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def put_tar(path: Path, files: Mapping[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(list(files.items()), format=format))
    return path


def audio_table(cells: Sequence[tuple[bytes | None, str | None]], *, column: str = "audio", marked: bool = True) -> Any:
    """As `datasets` writes it: a struct of bytes and path, marked in the metadata, beside a text."""
    values = [{"bytes": data, "path": path} for data, path in cells]
    table = pa.table({"text": [""] * len(values), column: pa.array(values, AUDIO)})
    features = {"text": {"dtype": "string", "_type": "Value"}, column: {"sampling_rate": 16000, "_type": "Audio"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if marked else {}
    return table.replace_schema_metadata(metadata)


def put_parquet(path: Path, table: Any, *, row_group_size: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def put_lines(path: Path, *lines: object) -> Path:
    """A JSON line per object, a string as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path
