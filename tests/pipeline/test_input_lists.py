import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.input_lists
from pipeline.errors import ConfigError
from pipeline.input_lists import BadLine, NamedAudio, beside, list_lines, manifest_lines

URI = "s3://bucket/sets/manifest.jsonl"
GOOD = '{"audio_filepath": "a.wav"}'


def parse(*lines: str, uri: str = URI, end: str = "\n") -> list[NamedAudio | BadLine]:
    return list(manifest_lines(io.BytesIO(end.join(lines).encode()), uri))


def reasons(*lines: str) -> list[str]:
    return [line.reason for line in parse(GOOD, *lines)[1:] if isinstance(line, BadLine)]


SECONDS = st.none() | st.floats(0, 1e6) | st.integers(0, 10**6)
ROWS = st.fixed_dictionaries(
    {"audio_filepath": st.from_regex(r"[a-zé \d#]{1,8}\.wav", fullmatch=True)},
    optional={
        "offset": SECONDS,
        "duration": st.none() | st.floats(1e-3, 1e6) | st.integers(1, 10**6),
        "text": st.text(),
        "speaker": st.integers() | st.text() | st.lists(st.integers()),  # of another type in every line
    },
)


@given(rows=st.lists(ROWS, max_size=30), block_bytes=st.integers(1, 300), blank=st.booleans(), mark=st.booleans())
def test_every_line_is_read_whatever_the_blocks(
    rows: list[dict[str, Any]], block_bytes: int, blank: bool, mark: bool
) -> None:
    lines = [json.dumps(row, ensure_ascii=index % 2 == 0) for index, row in enumerate(rows)]
    data = ("\ufeff" if mark else "").encode() + ("\n\n" if blank else "\n").join(lines).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.input_lists, "_BLOCK_BYTES", block_bytes)
        found = list(manifest_lines(io.BytesIO(data), URI))
    assert found == [
        NamedAudio(
            uri=f"s3://bucket/sets/{row['audio_filepath']}",
            start_seconds=row.get("offset"),
            duration_seconds=row.get("duration"),
        )
        for row in rows
    ]


@given(rows=st.lists(ROWS, min_size=1, max_size=20), bad=st.sets(st.integers(1, 19)))
def test_a_bad_line_costs_nothing_but_itself(rows: list[dict[str, Any]], bad: set[int]) -> None:
    lines = [json.dumps(row) for row in rows]
    spoilt = [f"{line[:-1]}," if index in bad else line for index, line in enumerate(lines)]
    expected, found = parse(*lines), parse(*spoilt)
    assert len(found) == len(lines)
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if index in bad:
            assert isinstance(other, BadLine)
            assert other.line == index + 1
        else:
            assert one == other


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "is not JSON"),
        ("[1]", "is a JSON list"),
        ('"a.wav"', "is a JSON str"),
        ("{}", "audio_filepath, expected a path; its keys are none"),
        ('{"audio": "a.wav", "text": ""}', "its keys are audio, text"),
        ('{"audio_filepath": ""}', "'' for its audio_filepath"),
        ('{"audio_filepath": 5}', "5 for its audio_filepath"),
        ('{"audio_filepath": "a\\u0000"}', "character that no file name can hold"),
        ('{"audio_filepath": "\\ud800.wav"}', "character that no file name can hold"),
        ('{"audio_filepath": "a", "offset": -1}', "the offset -1"),
        ('{"audio_filepath": "a", "offset": 1e999}', "the offset inf"),
        ('{"audio_filepath": "a", "offset": NaN}', "the offset nan"),
        ('{"audio_filepath": "a", "offset": "1"}', "the offset '1'"),
        ('{"audio_filepath": "a", "offset": true}', "the offset True"),
        ('{"audio_filepath": "a", "duration": 0}', "the duration 0"),
        ('{"audio_filepath": "a", "duration": -2.5}', "the duration -2.5"),
        ('{"audio_filepath": "a", "duration": []}', r"the duration \[\]"),
    ],
)
def test_a_line_that_names_nothing_says_why(line: str, says: str) -> None:
    (reason,) = reasons(line)
    assert re.search(says, reason)
    with pytest.raises(ConfigError, match=f"manifest.jsonl is no manifest: line 1 .*{says}.*expected"):
        parse(line, GOOD)


def test_a_bad_line_is_known_by_what_it_says() -> None:
    one, other = parse(GOOD, "{")[1], parse(GOOD, GOOD, "{")[2]
    assert isinstance(one, BadLine)
    assert isinstance(other, BadLine)
    assert (one.sha256, one.line, other.line) == (other.sha256, 2, 3)


def test_a_file_name_that_is_not_utf8_can_be_named() -> None:
    (found,) = parse('{"audio_filepath": "caf\\udce9.wav"}', uri="/data/m.jsonl")
    assert found == NamedAudio(uri="/data/caf\udce9.wav")


def test_windows_line_ends_are_line_ends() -> None:
    assert parse(GOOD, GOOD, "{", end="\r\n")[:2] == [NamedAudio(uri="s3://bucket/sets/a.wav")] * 2


@pytest.mark.parametrize("text", ["", "\n", "\n \n\n"])
def test_an_empty_manifest_names_nothing(text: str) -> None:
    assert parse(text) == list(list_lines(io.BytesIO(text.encode()), URI)) == []


@pytest.mark.parametrize(
    ("folder", "path", "uri"),
    [
        ("/data/m", "a.wav", "/data/m/a.wav"),
        ("/data/m", "../a.wav", "/data/a.wav"),
        ("/data/m", "/other/a.wav", "/other/a.wav"),
        ("/data/m", "s3://b/a.wav", "s3://b/a.wav"),
        ("/data/m", "~/a.wav", "/data/m/~/a.wav"),
        ("s3://b/m", "a.wav", "s3://b/m/a.wav"),
        ("s3://b/m", "../x/./a.wav", "s3://b/x/a.wav"),
        ("s3://b/m", "a..b/c.wav", "s3://b/m/a..b/c.wav"),
        ("s3://b/m", "/local/a.wav", "/local/a.wav"),
        ("memory://m", "a.wav", "memory://m/a.wav"),
    ],
)
def test_paths_are_relative_to_the_file_that_names_them(folder: str, path: str, uri: str) -> None:
    assert beside(folder, path) == uri


def test_a_list_names_a_uri_per_line() -> None:
    text = b"# header\na.wav\r\n\n  s3://other/b c.wav  \n/abs/d.wav#1\ncaf\xe9.wav\nx\0y\n"
    *named, bad = list_lines(io.BytesIO(text), "/lists/all.txt")
    uris = ["/lists/a.wav", "s3://other/b c.wav", "/abs/d.wav#1", "/lists/caf\udce9.wav"]
    assert named == [NamedAudio(uri=uri) for uri in uris]
    assert isinstance(bad, BadLine)
    assert bad.line == 7


def test_a_good_manifest_is_read_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.input_lists, "_parse_line", None)  # the careful way would fail
    row = {"audio_filepath": "a.wav", "offset": 0, "duration": 2, "extra": {"a": [1, None, "b"]}}
    assert (
        parse(json.dumps(row), json.dumps(row | {"extra": 5}))
        == [NamedAudio(uri="s3://bucket/sets/a.wav", start_seconds=0.0, duration_seconds=2.0)] * 2
    )
