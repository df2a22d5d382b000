import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.tar_files import TarEntry, tar_entries
from tests.containers import tar

NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=150)
FILES = st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=2000)), max_size=8)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


def entries_before_damage(data: bytes) -> tuple[list[TarEntry], str]:
    found: list[TarEntry] = []
    with pytest.raises(InputError) as caught:
        found.extend(tar_entries(io.BytesIO(data)))  # what came before the error stays in it
    assert caught.value.code == "BAD_CONTAINER"
    return found, caught.value.message


@given(files=FILES, format=FORMATS)
def test_every_file_is_listed_and_its_bytes_are_where_it_says(files: list[tuple[str, bytes]], format: int) -> None:
    data = tar(files, format=format)
    found = list(tar_entries(io.BytesIO(data)))
    assert [entry.name for entry in found] == [name for name, _ in files]
    assert [data[entry.offset_bytes :][: entry.size_bytes] for entry in found] == [content for _, content in files]
    assert all(entry.fault is None for entry in found)


@given(files=FILES, format=FORMATS, place=st.floats(0, 1), at_a_block=st.booleans())
def test_a_tar_that_ends_too_early_never_passes_for_a_whole_one(
    files: list[tuple[str, bytes]], format: int, place: float, at_a_block: bool
) -> None:
    data = tar(files, format=format)
    whole = list(tar_entries(io.BytesIO(data)))
    end = len(data.rstrip(b"\0")) if whole else 0
    length = int(place * end)
    found, _ = entries_before_damage(data[: length // 512 * 512 if at_a_block else length])
    assert found == whole[: len(found)]


def test_tars_that_were_joined_are_told() -> None:
    one, other = tar([("a.wav", b"a")]), tar([("b.wav", b"b")])
    found, damage = entries_before_damage(one + other)
    assert [entry.name for entry in found] == ["a.wav"]
    assert "more follows its end mark" in damage


def test_a_damaged_header_is_told_with_what_came_before() -> None:
    # `tarfile` alone ends here without a word, and the files behind it would be lost.
    files = [(f"{number}.wav", bytes([number]) * 700) for number in range(4)]
    data = bytearray(tar(files, format=tarfile.GNU_FORMAT))
    third = list(tar_entries(io.BytesIO(data)))[2].offset_bytes - tarfile.BLOCKSIZE
    data[third : third + 200] = b"x" * 200
    found, damage = entries_before_damage(bytes(data))
    assert [entry.name for entry in found] == ["0.wav", "1.wav"]
    assert "damaged after 2 files" in damage


@pytest.mark.parametrize("data", [b"", b"no tar", b"\x1f\x8b" + b"\0" * 2000, b"x" * 5000])
def test_what_is_no_tar_is_told(data: bytes) -> None:
    found, damage = entries_before_damage(data)
    assert found == []
    assert "not an uncompressed tar" in damage


def test_a_link_is_listed_with_what_is_wrong_with_it() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as writer:
        writer.addfile(tarfile.TarInfo("a.wav"), io.BytesIO(b""))
        for name, kind in [("b.wav", tarfile.LNKTYPE), ("c.wav", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.wav"
            writer.addfile(info)
    found = list(tar_entries(io.BytesIO(sink.getvalue())))
    assert [(entry.name, entry.fault is None) for entry in found] == [
        ("a.wav", True),
        ("b.wav", False),
        ("c.wav", False),
    ]
    assert "link to a.wav" in str(found[1].fault)
