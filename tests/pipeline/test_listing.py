import os
import random
import tempfile
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.listing import FileEntry, Pattern, ascending, has_glob, in_order

NAME = st.lists(st.sampled_from(["a", "ab", "b", ".h", "a.wav", "a-b"]), min_size=1, max_size=4).map("/".join)
PATTERN = st.lists(st.sampled_from(["a", "*", "a*", "?", "[ab]", "**", ".h", ".*"]), min_size=1, max_size=4).map(
    "/".join
)


def entry(uri: str) -> FileEntry:
    return FileEntry(uri=uri, size_bytes=len(uri), version=uri[::-1])


@given(st.lists(st.text(max_size=5)), st.integers(1, 6))
def test_any_entries_come_out_sorted_however_few_fit_in_memory(uris: list[str], run_length: int) -> None:
    entries = [entry(uri) for uri in uris]
    expected = sorted(entries, key=lambda entry: entry.uri)
    assert list(in_order(iter(entries), run_length=run_length)) == expected
    assert list(ascending(expected)) == expected


@given(st.lists(st.text(max_size=5), unique=True))
def test_the_order_is_that_of_utf8_bytes(uris: list[str]) -> None:
    assert sorted(uris) == sorted(uris, key=lambda uri: uri.encode())


def test_an_entry_out_of_order_is_not_passed_on() -> None:
    listing = ascending([entry("a"), entry("c"), entry("b")])
    assert [next(listing), next(listing)] == [entry("a"), entry("c")]
    with pytest.raises(OSError, match="b: listed after c"):
        next(listing)


def test_sorting_takes_no_more_memory_for_more_entries() -> None:
    def peak_bytes(count: int) -> int:
        def entries() -> Iterator[FileEntry]:
            dice = random.Random(0)
            return (entry(f"s3://bucket/folder/{dice.random()}.wav") for _ in range(count))

        tracemalloc.start()
        try:
            assert sum(1 for _ in in_order(entries(), run_length=500)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(5000) < 3 * peak_bytes(1000)  # of each run, one entry and a file's buffer


def test_a_listing_that_is_not_read_to_its_end_leaves_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    listing = in_order((entry(str(number)) for number in range(100)), run_length=10)
    next(listing)
    del listing
    assert len(os.listdir("/proc/self/fd")) == before
    assert tempfile.gettempdir()


@given(name=NAME, pattern=PATTERN)
def test_every_folder_above_a_wanted_file_is_entered(name: str, pattern: str) -> None:
    wanted = Pattern(pattern)
    if wanted.wants(name):
        assert name.startswith(wanted.prefix)
        parts = name.split("/")
        assert all(wanted.enters("/".join(parts[:depth])) for depth in range(1, len(parts)))


@pytest.mark.parametrize(
    ("pattern", "folder", "entered"),
    [
        ("a*/x.wav", "ab", True),
        ("a*/x.wav", "b", False),
        ("a*/x.wav", "ab/deeper", False),
        ("*.wav", "a", False),
        ("a/**", "a/b/c", True),
        ("a/**", "b", False),
        ("**/x.wav", "anything/below", True),
        ("**", ".git", False),
        ("**/.*", ".git", True),
    ],
)
def test_folders_that_cannot_hold_a_match_are_left_out(pattern: str, folder: str, entered: bool) -> None:
    assert Pattern(pattern).enters(folder) == entered


def test_the_static_part_of_a_pattern() -> None:
    assert [Pattern(text).prefix for text in ("a/b*.wav", "*", "a/[b]", "plain")] == ["a/b", "", "a/", "plain"]
    assert has_glob("a[1]")
    assert not has_glob("a")


def test_a_pattern_that_means_nothing_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"x\*\*y: "):
        Pattern("x**y")
