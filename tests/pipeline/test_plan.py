import os
import random
import wave
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import InputConfig, OutputConfig, RunConfig
from pipeline.errors import ConfigError, SystemFailure
from pipeline.messages import Shard, Source
from pipeline.plan import Plan, committed, cut_shards, estimate_seconds, make_plan, read_plan, remaining
from pipeline.storage import Storage
from pipeline.write import part_uri

RATE_HZ = 8000
Estimated = list[tuple[Source, float]]


def make_source(number: int, *, suffix: str = ".wav", size_bytes: int | None = 1000) -> Source:
    return Source(id=f"{number:032x}", uri=f"memory://nothing/{number}{suffix}", size_bytes=size_bytes)


def put_wav(path: Path, *, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(b"\0\0" * round(seconds * RATE_HZ))


def make_config(folder: Path, *, hours: float = 1.0) -> RunConfig:
    return RunConfig(
        input=InputConfig(uris=[f"{folder}/in"], shard_audio_hours=hours), output=OutputConfig(uri=f"{folder}/out")
    )


def plan_folder(folder: Path, *, hours: float = 1.0, write: bool = True) -> Plan:
    return make_plan(make_config(folder, hours=hours), Storage(), Storage(), write=write)


def manifests_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out/_kikitori/manifest").glob("*"))}


def inputs_of(shards: tuple[Shard, ...]) -> list[str]:
    return sorted(source.uri for shard in shards for source in shard.sources)


@st.composite
def estimates(draw: st.DrawFn) -> Estimated:
    seconds = draw(st.lists(st.floats(0, 20_000) | st.just(60.0), max_size=60))
    return [(make_source(number), one) for number, one in enumerate(seconds)]


@given(estimated=estimates(), hours=st.floats(0.001, 10), seed=st.integers())
def test_shards_hold_every_input_once_whatever_the_order_of_the_listing(
    estimated: Estimated, hours: float, seed: int
) -> None:
    shards = cut_shards(estimated, shard_audio_hours=hours)
    assert sorted(source.id for shard in shards for source in shard.sources) == [source.id for source, _ in estimated]
    shuffled = list(estimated)
    random.Random(seed).shuffle(shuffled)
    assert cut_shards(shuffled, shard_audio_hours=hours) == shards


@given(estimated=estimates(), hours=st.floats(0.001, 10))
def test_shards_are_within_the_limit_and_the_longest_comes_first(estimated: Estimated, hours: float) -> None:
    seconds_of = {source.id: seconds for source, seconds in estimated}
    shards = cut_shards(estimated, shard_audio_hours=hours)
    longest = [max(seconds_of[source.id] for source in shard.sources) for shard in shards]
    assert longest == sorted(longest, reverse=True)
    for shard in shards:
        assert len(shard.sources) == 1 or shard.estimated_seconds <= hours * 3600 * (1 + 1e-9)
        assert shard.estimated_seconds == pytest.approx(sum(seconds_of[source.id] for source in shard.sources))


@given(estimated=estimates(), more=st.floats(0.001, 10))
def test_the_id_of_a_shard_follows_from_its_inputs_alone(estimated: Estimated, more: float) -> None:
    one = cut_shards(estimated, shard_audio_hours=1.0)
    other = cut_shards([(source, seconds * more) for source, seconds in estimated], shard_audio_hours=more)
    held = {shard.id: {source.id for source in shard.sources} for shard in (*one, *other)}
    assert all(held[shard.id] == {source.id for source in shard.sources} for shard in (*one, *other))
    assert all(len(id) == 16 for id in held)
    assert len({frozenset(ids) for ids in held.values()}) == len(held)


def test_a_shard_of_very_short_files_is_cut_by_number() -> None:
    shards = cut_shards([(make_source(number), 0.0) for number in range(5000)], shard_audio_hours=1.0)
    assert [len(shard.sources) for shard in sorted(shards, key=lambda shard: -len(shard.sources))] == [2048, 2048, 904]


def test_no_limit_gives_one_shard() -> None:
    estimated = [(make_source(number), 1e6) for number in range(3)]
    assert len(cut_shards(estimated, shard_audio_hours=float("inf"))) == 1


def test_a_plan_read_back_is_the_plan_that_was_made(tmp_path: Path) -> None:
    for number in range(7):
        put_wav(tmp_path / f"in/{number}.wav", seconds=(number + 1) / 10)
    (tmp_path / "in/notes.txt").write_text("not audio")
    plan = plan_folder(tmp_path, hours=1.0 / 3600)
    assert len(plan.shards) > 1
    assert plan.num_inputs == 7
    assert plan.estimated_seconds == pytest.approx(2.8)
    assert dict(plan.ignored) == {".txt": 1}
    assert read_plan(f"{tmp_path}/out", Storage()).shards == plan.shards


def test_planning_again_changes_nothing(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)
    plan = plan_folder(tmp_path)
    before = manifests_of(tmp_path)
    assert plan_folder(tmp_path) == plan
    assert manifests_of(tmp_path) == before
    assert list(before) == ["plan-00000.parquet"]


def test_added_inputs_are_appended_and_old_shards_stay(tmp_path: Path) -> None:
    for number in range(4):
        put_wav(tmp_path / f"in/{number}.wav", seconds=0.2)
    old = plan_folder(tmp_path, hours=0.5 / 3600)
    before = manifests_of(tmp_path)
    for number in range(4, 7):
        put_wav(tmp_path / f"in/{number}.wav", seconds=0.1 * number)
    new = plan_folder(tmp_path, hours=10)
    assert set(old.shards) < set(new.shards)
    assert inputs_of(new.shards) == [f"{tmp_path}/in/{number}.wav" for number in range(7)]
    after = manifests_of(tmp_path)
    assert after.items() > before.items()
    assert len(after) == 2
    assert read_plan(f"{tmp_path}/out", Storage()).shards == new.shards


def test_an_input_that_is_gone_stays_planned(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)
    put_wav(tmp_path / "in/b.wav", seconds=0.1)
    plan = plan_folder(tmp_path)
    (tmp_path / "in/a.wav").unlink()
    assert plan_folder(tmp_path) == plan


def test_a_changed_input_is_planned_again_under_another_id(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)
    old = plan_folder(tmp_path)
    put_wav(tmp_path / "in/a.wav", seconds=0.2)
    new = plan_folder(tmp_path)
    assert set(old.shards) < set(new.shards)
    assert new.num_inputs == 2
    assert len({source.id for shard in new.shards for source in shard.sources}) == 2


def test_two_planners_at_once_plan_no_input_twice(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)

    class Overtaken(Storage):
        """Another planner, who has seen one file fewer, writes its manifest just before ours."""

        def create(self, uri: str, data: bytes) -> bool:
            if uri.endswith("plan-00000.parquet") and not os.path.exists(uri):
                (tmp_path / "in/b.wav").rename(tmp_path / "b.wav")
                plan_folder(tmp_path)
                (tmp_path / "b.wav").rename(tmp_path / "in/b.wav")
            return super().create(uri, data)

    put_wav(tmp_path / "in/b.wav", seconds=0.1)
    plan = make_plan(make_config(tmp_path), Storage(), Overtaken())
    assert inputs_of(plan.shards) == [f"{tmp_path}/in/a.wav", f"{tmp_path}/in/b.wav"]
    assert list(manifests_of(tmp_path)) == ["plan-00000.parquet", "plan-00001.parquet"]
    assert read_plan(f"{tmp_path}/out", Storage()).shards == plan.shards


def test_a_storage_that_refuses_every_manifest_ends_the_run(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)

    class Refusing(Storage):
        def check_writable(self, folder_uri: str) -> None: ...
        def create(self, uri: str, data: bytes) -> bool:
            return False

    with pytest.raises(SystemFailure, match="manifest"):
        make_plan(make_config(tmp_path), Storage(), Refusing())


def test_a_plan_can_be_made_without_writing_it(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)
    plan = plan_folder(tmp_path, write=False)
    assert not (tmp_path / "out").exists()
    assert plan_folder(tmp_path).shards == plan.shards


def test_a_missing_file_is_planned_with_no_audio(tmp_path: Path) -> None:
    config = RunConfig(input=InputConfig(uris=[f"{tmp_path}/gone.wav"]), output=OutputConfig(uri=f"{tmp_path}/out"))
    (shard,) = make_plan(config, Storage(), Storage()).shards
    assert (shard.sources[0].size_bytes, shard.estimated_seconds) == (None, 0.0)


def test_file_names_that_are_not_utf8_survive_the_manifest(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/x.wav", seconds=0.1)
    os.rename(os.fsencode(tmp_path) + b"/in/x.wav", os.fsencode(tmp_path) + b"/in/caf\xe9.wav")
    plan = plan_folder(tmp_path)
    assert inputs_of(plan.shards) == [f"{tmp_path}/in/caf\udce9.wav"]
    assert read_plan(f"{tmp_path}/out", Storage()).shards == plan.shards


def test_output_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"output\.uri"):
        make_plan(RunConfig(input=InputConfig(uris=["a.wav"])), Storage(), Storage())


def test_a_plan_that_was_never_made_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/out.*kikitori plan"):
        read_plan(f"{tmp_path}/out", Storage())


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)
    plan_folder(tmp_path)
    manifest = tmp_path / "out/_kikitori/manifest/plan-00000.parquet"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(SystemFailure, match=r"plan-00000\.parquet"):
        plan_folder(tmp_path)
    pq.write_table(pa.table({"id": ["a"]}), manifest)
    with pytest.raises(SystemFailure, match=r"plan-00000\.parquet"):
        read_plan(f"{tmp_path}/out", Storage())


def test_a_manifest_that_plans_an_input_again_is_refused(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)
    plan_folder(tmp_path)
    folder = tmp_path / "out/_kikitori/manifest"
    (folder / "plan-00001.parquet").write_bytes((folder / "plan-00000.parquet").read_bytes())
    with pytest.raises(SystemFailure, match="planned twice"):
        read_plan(f"{tmp_path}/out", Storage())


def test_what_is_committed_does_not_remain(tmp_path: Path) -> None:
    for number in range(3):
        put_wav(tmp_path / f"in/{number}.wav", seconds=0.2)
    plan = plan_folder(tmp_path, hours=0.2 / 3600)
    output = f"{tmp_path}/out"
    assert committed(output, Storage()) == set()
    assert remaining(plan, set()) == plan.shards
    done = plan.shards[1].id
    Storage().create(part_uri(output, done), b"part")
    Storage().create(f"{output}/data/something-else.parquet", b"not ours")
    assert committed(output, Storage()) == {done}
    assert remaining(plan, committed(output, Storage())) == (plan.shards[0], plan.shards[2])


def test_few_inputs_are_estimated_from_their_headers(tmp_path: Path) -> None:
    put_wav(tmp_path / "a.wav", seconds=1.5)
    put_wav(tmp_path / "b.wav", seconds=0.5)
    sources = [Source(id=name, uri=f"{tmp_path}/{name}.wav", size_bytes=1) for name in "ab"]
    assert [seconds for _, seconds in estimate_seconds(sources, Storage())] == [1.5, 0.5]


def test_an_input_that_does_not_tell_is_taken_as_the_others_of_its_kind(tmp_path: Path) -> None:
    put_wav(tmp_path / "a.wav", seconds=2.0)
    size_bytes = (tmp_path / "a.wav").stat().st_size
    (tmp_path / "b.wav").write_bytes(b"\0" * 10)
    told = Source(id="a", uri=f"{tmp_path}/a.wav", size_bytes=size_bytes)
    like_it = Source(id="b", uri=f"{tmp_path}/b.wav", size_bytes=size_bytes * 3)
    unlike = Source(id="c", uri=f"{tmp_path}/c.flac", size_bytes=160_000)
    unsized = Source(id="d", uri=f"{tmp_path}/d.wav")
    estimated = estimate_seconds([told, like_it, unlike, unsized], Storage())
    assert [seconds for _, seconds in estimated] == pytest.approx([2.0, 6.0, 10.0, 0.0])


def test_of_many_inputs_a_fixed_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def probe(storage: Storage, uri: str) -> float | None:
        opened.append(uri)
        return 10.0 if uri.endswith(".wav") else None

    monkeypatch.setattr("pipeline.plan.probe_seconds", probe)
    sources = [make_source(number) for number in range(600)]
    sources += [make_source(number, suffix=".mp3", size_bytes=32_000) for number in range(600, 700)]
    estimated = estimate_seconds(sources, Storage())
    assert len(opened) == 128
    assert {seconds for source, seconds in estimated if source.uri.endswith(".wav")} == {10.0}
    assert {seconds for source, seconds in estimated if source.uri.endswith(".mp3")} == {2.0}
    sample, opened[:] = set(opened), []
    assert estimate_seconds(sources[::-1], Storage()) == estimated[::-1]
    assert set(opened) == sample


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -1.0])
def test_a_header_that_lies_does_not_spoil_the_plan(monkeypatch: pytest.MonkeyPatch, nonsense: float) -> None:
    monkeypatch.setattr("pipeline.plan.probe_seconds", lambda storage, uri: nonsense)
    assert estimate_seconds([make_source(1, size_bytes=32_000)], Storage())[0][1] == 2.0
