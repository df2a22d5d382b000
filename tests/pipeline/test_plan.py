import io
import os
import tempfile
import wave
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline.plan
from pipeline.config import InputConfig, OutputConfig, RunConfig
from pipeline.discover import discover
from pipeline.errors import ConfigError, SystemFailure
from pipeline.manifests import load_shard
from pipeline.messages import Segment, ShardRef, Source
from pipeline.plan import Plan, committed, make_plan, read_plan, remaining
from pipeline.storage import Storage
from pipeline.write import part_uri
from tests.containers import audio_table, put_lines, put_parquet, put_tar

RATE_HZ = 8000


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


def plan_folder(folder: Path, *, hours: float = 1.0) -> Plan:
    return make_plan(make_config(folder, hours=hours), Storage(), Storage())


def manifests_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out/_kikitori/manifest").glob("*"))}


def sources_of(shards: Iterable[ShardRef]) -> list[Source]:
    loaded = [source for shard in shards for source in load_shard(shard, Storage()).sources]
    return sorted(loaded, key=lambda source: (source.uri, source.id))


def inputs_of(shards: Iterable[ShardRef]) -> list[str]:
    return [source.uri for source in sources_of(shards)]


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
    assert list(before) == ["plan-00000.manifest"]


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
    assert len({source.id for source in sources_of(new.shards)}) == 2


def test_two_planners_at_once_plan_no_input_twice(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)

    class Overtaken(Storage):
        """Another planner, who has seen one file fewer, writes its manifest just before ours."""

        def create(self, uri: str, data: bytes) -> bool:
            if uri.endswith("plan-00000.manifest") and not os.path.exists(uri):
                (tmp_path / "in/b.wav").rename(tmp_path / "b.wav")
                plan_folder(tmp_path)
                (tmp_path / "b.wav").rename(tmp_path / "in/b.wav")
            return super().create(uri, data)

    put_wav(tmp_path / "in/b.wav", seconds=0.1)
    plan = make_plan(make_config(tmp_path), Storage(), Overtaken())
    assert inputs_of(plan.shards) == [f"{tmp_path}/in/a.wav", f"{tmp_path}/in/b.wav"]
    assert list(manifests_of(tmp_path)) == ["plan-00000.manifest", "plan-00001.manifest"]
    assert read_plan(f"{tmp_path}/out", Storage()).shards == plan.shards


def test_a_storage_that_refuses_every_manifest_ends_the_run(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)

    class Refusing(Storage):
        def probe(self, folder_uri: str) -> Storage:
            return self

        def create(self, uri: str, data: bytes) -> bool:
            return False

    with pytest.raises(SystemFailure, match="manifest"):
        make_plan(make_config(tmp_path), Storage(), Refusing())


def test_a_missing_file_is_planned_with_no_audio(tmp_path: Path) -> None:
    config = RunConfig(input=InputConfig(uris=[f"{tmp_path}/gone.wav"]), output=OutputConfig(uri=f"{tmp_path}/out"))
    (shard,) = make_plan(config, Storage(), Storage()).shards
    assert (sources_of([shard])[0].size_bytes, shard.estimated_seconds) == (None, 0.0)


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
    manifest = tmp_path / "out/_kikitori/manifest/plan-00000.manifest"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(SystemFailure, match=r"plan-00000\.manifest"):
        plan_folder(tmp_path)
    pq.write_table(pa.table({"id": ["a"]}), manifest)
    with pytest.raises(SystemFailure, match=r"plan-00000\.manifest"):
        read_plan(f"{tmp_path}/out", Storage())


def test_a_manifest_that_plans_an_input_again_is_refused(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)
    plan_folder(tmp_path)
    folder = tmp_path / "out/_kikitori/manifest"
    (folder / "plan-00001.manifest").write_bytes((folder / "plan-00000.manifest").read_bytes())
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


# --- windows


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of a few inputs that are written as those of millions are."""
    monkeypatch.setattr(pipeline.plan, "_WINDOW_INPUTS", 4)
    monkeypatch.setattr(pipeline.plan, "_LISTED_INPUTS", 2)


def put_manifest(folder: Path, numbers: Iterable[int]) -> None:
    folder.mkdir(exist_ok=True)
    lines = (
        {"audio_filepath": f"{number % 7}.wav", "offset": number, "duration": 1 + number % 5} for number in numbers
    )
    put_lines(folder / "in.jsonl", *lines)


def plan_manifest(folder: Path, storage: Storage | None = None, *, hours: float = 3 / 3600) -> Plan:
    config = RunConfig(
        input=InputConfig(uris=[f"{folder}/in.jsonl"], shard_audio_hours=hours),
        output=OutputConfig(uri=f"{folder}/out"),
    )
    return make_plan(config, Storage(), storage or Storage())


def starts_of(plan: Plan) -> list[float]:
    places = [source.place for source in sources_of(plan.shards)]
    return sorted(place.start_seconds for place in places if isinstance(place, Segment))


@pytest.mark.usefixtures("small_windows")
@given(
    rounds=st.lists(st.lists(st.integers(0, 60), max_size=25), min_size=1, max_size=3),
    hours=st.floats(1 / 3600, 1),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_windows_every_input_is_planned_once(rounds: list[list[int]], hours: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, numbers, old = Path(name), set[int](), Plan(shards=())
        for more in rounds:
            numbers |= {0, *more}
            put_manifest(folder, [*more, 0, *more])  # lines that are there twice, and old ones that are gone
            plan = plan_manifest(folder, hours=hours)
            assert starts_of(plan) == sorted(numbers)
            assert plan.num_inputs == len(numbers)
            assert plan.estimated_seconds == sum(1 + number % 5 for number in numbers)
            assert set(old.shards) <= set(plan.shards)
            assert [shard.longest_seconds for shard in plan.shards] == sorted(
                (shard.longest_seconds for shard in plan.shards), reverse=True
            )
            assert read_plan(f"{folder}/out", Storage()).shards == plan.shards
            old = plan
        sizes = [pq.read_metadata(io.BytesIO(data)).num_rows for data in manifests_of(folder).values()]
        assert all(0 < size <= 4 + 1 for size in sizes)  # a window is looked at in pieces of two


@pytest.mark.usefixtures("small_windows")
def test_a_planner_that_dies_is_followed_by_one_that_goes_on(tmp_path: Path) -> None:
    class Dying(Storage):
        def create(self, uri: str, data: bytes) -> bool:
            if uri.endswith("plan-00002.manifest"):
                raise KeyboardInterrupt
            return super().create(uri, data)

    put_manifest(tmp_path, range(20))
    with pytest.raises(KeyboardInterrupt):
        plan_manifest(tmp_path, Dying())
    interrupted = read_plan(f"{tmp_path}/out", Storage())
    assert interrupted.num_inputs == 8
    plan = plan_manifest(tmp_path)
    assert starts_of(plan) == list(range(20))
    assert set(interrupted.shards) < set(plan.shards)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("before_window", range(5))
def test_two_planners_at_once_share_the_windows(tmp_path: Path, before_window: int) -> None:
    """The other one, who has seen another half, writes all of its windows just before one of ours."""

    class Overtaken(Storage):
        def create(self, uri: str, data: bytes) -> bool:
            if uri.endswith(f"plan-{before_window:05d}.manifest") and not os.path.exists(uri):
                put_manifest(tmp_path, range(10, 30))
                plan_manifest(tmp_path)
            return super().create(uri, data)

    put_manifest(tmp_path, range(20))
    plan = plan_manifest(tmp_path, Overtaken())
    assert starts_of(plan) == list(range(30))
    assert read_plan(f"{tmp_path}/out", Storage()).shards == plan.shards


@pytest.mark.usefixtures("small_windows")
def test_two_planners_in_two_threads_plan_no_input_twice(tmp_path: Path) -> None:
    put_manifest(tmp_path, range(60))
    (tmp_path / "out").mkdir()
    with ThreadPoolExecutor(4) as threads:
        plans = list(threads.map(lambda _: plan_manifest(tmp_path), range(4)))
    assert starts_of(read_plan(f"{tmp_path}/out", Storage())) == list(range(60))
    assert all(starts_of(plan) == list(range(60)) for plan in plans)


def test_a_plan_that_was_begun_by_the_first_release_goes_on(tmp_path: Path) -> None:
    """Its manifest lacks the columns of places; its shards and ids are those we would make of the same files."""
    for number in range(4):
        put_wav(tmp_path / f"in/{number}.wav", seconds=0.2)
    plan = plan_folder(tmp_path, hours=0.5 / 3600)
    manifest = tmp_path / "out/_kikitori/manifest/plan-00000.manifest"
    first = ["id", "uri", "size_bytes", "version", "estimated_seconds", "shard_id", "position"]
    pq.write_table(pq.read_table(manifest, columns=first), manifest)
    assert plan_folder(tmp_path) == plan
    assert inputs_of(plan.shards) == [f"{tmp_path}/in/{number}.wav" for number in range(4)]
    assert list(manifests_of(tmp_path)) == ["plan-00000.manifest"]


def test_what_is_inside_of_containers_is_planned_and_read_back(tmp_path: Path) -> None:
    put_wav(tmp_path / "in/a.wav", seconds=0.1)
    put_tar(tmp_path / "in/b.tar", {"caf\udce9.wav": b"x", "2.wav": b"yy"})
    put_parquet(tmp_path / "in/c.parquet", audio_table([(b"x", None)] * 3))
    (tmp_path / "in/d.tar").write_bytes(b"no tar")
    plan = plan_folder(tmp_path)
    expected = [one.source for one in discover([f"{tmp_path}/in"], Storage()).found]
    assert len(expected) == plan.num_inputs == 7
    assert sources_of(plan.shards) == expected
    assert sources_of(read_plan(f"{tmp_path}/out", Storage()).shards) == expected
