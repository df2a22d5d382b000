import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import CheckpointConfig, load_config
from pipeline.discover import discover
from pipeline.errors import CheckpointError, ConfigError
from pipeline.fetch import fetch
from pipeline.messages import AudioFacts, Failure, Source, Transcript
from pipeline.run import Stages, build_stages, in_order, resolve_device, transcribe
from pipeline.storage import Storage
from tests.make_audio import sine, wav

SPEECH = Path(__file__).parent.parent / "data" / "speech"
EXPECTED = {row["file"]: row for row in json.loads((SPEECH / "digits_expected.json").read_text())}
DEMO = ("checkpoint.source=demo", "checkpoint.device=cpu")


def stages_of(*overrides: str) -> Stages:
    config = load_config(None, [*DEMO, *overrides])
    return build_stages(config, fetch(config.checkpoint))


def digits() -> list[Source]:
    return [found.source for found in discover([str(SPEECH / "digits")], Storage()).found]


def results_of(sources: Sequence[Source], *overrides: str) -> dict[str, Transcript | Failure]:
    return {result.source.uri: result for result in transcribe(sources, stages_of(*overrides))}


def tokens_of(results: dict[str, Transcript | Failure]) -> dict[str, list[int]]:
    return {uri: one.ids.tolist() for uri, one in results.items() if isinstance(one, Transcript)}


@pytest.fixture(scope="module")
def heard() -> dict[str, Transcript | Failure]:
    """The bundled digits through every stage with the default options."""
    return results_of(digits())


def test_the_bundled_digits_are_heard_as_they_always_were(heard: dict[str, Transcript | Failure]) -> None:
    assert len(heard) == len(EXPECTED)
    for uri, transcript in heard.items():
        expected = EXPECTED[f"digits/{Path(uri).name}"]
        assert isinstance(transcript, Transcript)
        assert transcript.text == expected["hyp"]
        assert transcript.ids.tolist() == [*expected["tokens"], 3]  # F there, F + 1 here: the last is padding


def test_words_are_the_text_and_lie_in_the_file(heard: dict[str, Transcript | Failure]) -> None:
    for transcript in heard.values():
        assert isinstance(transcript, Transcript)
        assert transcript.text == " ".join(word.text for word in transcript.words)
        duration = transcript.facts.duration_seconds
        assert duration is not None
        starts = [word.start_seconds for word in transcript.words]
        assert starts == sorted(starts)
        assert all(0 <= word.start_seconds <= word.end_seconds <= duration for word in transcript.words)
        assert all(0 < word.confidence <= 1 for word in transcript.words)


def test_words_begin_where_they_were_spoken(heard: dict[str, Transcript | Failure]) -> None:
    """To within 0.4 s: the model marks a word by frames of 80 ms, and was taught times of a synthetic voice."""
    for uri, transcript in heard.items():
        assert isinstance(transcript, Transcript)
        spoken = EXPECTED[f"digits/{Path(uri).name}"]["words_seconds"]
        if [word for word, *_ in spoken] != [word.text for word in transcript.words]:
            continue
        late = [word.start_seconds - begun for word, (_, begun, _) in zip(transcript.words, spoken, strict=True)]
        assert max(abs(one) for one in late) < 0.4


@pytest.mark.parametrize("slots", [1, 3, 40])
def test_tokens_do_not_depend_on_the_number_of_slots(heard: dict[str, Transcript | Failure], slots: int) -> None:
    assert tokens_of(results_of(digits(), f"stages.generate.slots={slots}")) == tokens_of(heard)


@pytest.mark.parametrize("piece_seconds", [0.08, 0.5, 600])
def test_tokens_do_not_depend_on_the_size_of_pieces(
    heard: dict[str, Transcript | Failure], piece_seconds: float
) -> None:
    some = digits()[:4]
    results = results_of(some, f"stages.encode.piece_seconds={piece_seconds}")
    assert tokens_of(results) == {source.uri: tokens_of(heard)[source.uri] for source in some}


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("piece_seconds", ["auto", "0.4"])
def test_tokens_do_not_depend_on_who_is_encoded_with_whom(
    heard: dict[str, Transcript | Failure], rows: int, piece_seconds: str
) -> None:
    overrides = (f"stages.encode.rows={rows}", f"stages.encode.piece_seconds={piece_seconds}")
    assert tokens_of(results_of(digits(), *overrides)) == tokens_of(heard)


def test_a_codec_in_bfloat16_hears_nearly_the_same(heard: dict[str, Transcript | Failure]) -> None:
    """Other codes, and another fingerprint for it, but still the digits: most of the clips have the same text."""
    results = results_of(digits(), "stages.encode.precision=bfloat16", "stages.encode.rows=3")
    texts = {uri: one.text for uri, one in results.items() if isinstance(one, Transcript)}
    same = [uri for uri, one in heard.items() if isinstance(one, Transcript) and one.text == texts[uri]]
    assert len(texts) == len(heard)
    assert len(same) > len(heard) / 2


def test_a_precision_that_only_gpus_have_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"precision is tf32, which only GPUs have, but the device is cpu"):
        stages_of("stages.encode.precision=tf32").encode()


def test_tokens_do_not_depend_on_the_order_of_inputs_or_on_bad_ones_between(
    heard: dict[str, Transcript | Failure], tmp_path: Path
) -> None:
    bad = [_put(tmp_path, f"{number}.wav", b"not audio") for number in range(3)]
    sources = [*digits(), *bad]
    random.Random(1).shuffle(sources)
    results = results_of(sources)
    assert tokens_of(results) == tokens_of(heard)
    assert results.keys() == {source.uri for source in sources}
    assert all(isinstance(results[one.uri], Failure) for one in bad)


@pytest.mark.parametrize(
    ("alignment", "extra"), [("all-frames", 1), ("bos-replaces-first", 0), ("first-frame-twice", 0)]
)
def test_every_mode_emits_the_promised_number_of_tokens(tmp_path: Path, alignment: str, extra: int) -> None:
    """F = floor((prefix + samples at 24 kHz + tail) / 1920), tail = delay + 1 s."""
    sizes = [1920, 1921, 24_000, 24_959, 50_001]
    sources = [_put(tmp_path, f"{size}.wav", wav(sine(size / 24_000))) for size in sizes]
    results = results_of(sources, f"stages.generate.alignment={alignment}", "output.columns=[codes]")
    speech = stages_of().checkpoint.speech
    prefix, tail = int(speech.prefix_seconds * 24_000), int((speech.delay_seconds + 1) * 24_000)
    for source, size in zip(sources, sizes, strict=True):
        transcript, num_frames = results[source.uri], (prefix + size + tail) // 1920
        assert isinstance(transcript, Transcript)
        assert len(transcript.ids) == num_frames + extra
        assert transcript.codes is not None
        assert transcript.codes.shape[0] == 8
        if alignment != "first-frame-twice":
            assert transcript.codes.shape[1] == num_frames


def test_silence_is_no_speech_and_no_failure(tmp_path: Path) -> None:
    """A stream without a word once broke the whole run."""
    [result] = results_of([_put(tmp_path, "silent.wav", wav(np.zeros(48_000, np.float32)))]).values()
    assert isinstance(result, Transcript)
    assert (result.text, result.words, result.avg_logprob) == ("", (), None)


def test_codes_are_kept_only_when_they_are_wanted(heard: dict[str, Transcript | Failure]) -> None:
    assert all(isinstance(one, Transcript) and one.codes is None for one in heard.values())


def _transcript(source: Source) -> Transcript:
    return Transcript(
        source=source, facts=AudioFacts(), text=source.id, words=(), avg_logprob=None, ids=np.zeros(0, np.int32)
    )


@pytest.mark.parametrize("seed", range(5))
def test_results_come_in_the_order_of_their_sources(seed: int) -> None:
    sources = [Source(id=str(number), uri=f"{number}.wav") for number in range(20)]
    arriving = [_transcript(source) for source in sources]
    random.Random(seed).shuffle(arriving)
    assert [one.source for one in in_order(sources, arriving)] == sources


def test_a_result_waits_only_for_those_before_it() -> None:
    sources = [Source(id=str(number), uri=f"{number}.wav") for number in range(3)]
    taken: list[str] = []

    def arrive() -> Iterator[Transcript]:
        for source in sources:
            taken.append(source.id)
            yield _transcript(source)

    ordered = in_order(sources, arrive())
    assert [next(ordered).source.id, *taken] == ["0", "0"]
    assert [next(ordered).source.id, *taken] == ["1", "0", "1"]


@pytest.mark.parametrize(
    ("asked", "num_gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda:1", 2, "cuda:1")],
)
def test_auto_means_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, asked: str, num_gpus: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert resolve_device(asked) == device


@pytest.mark.parametrize(
    ("asked", "num_gpus", "found"), [("cuda", 0, "no GPU"), ("cuda:2", 2, "2 GPUs, counted from 0")]
)
def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: str, num_gpus: int, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ConfigError, match=rf"checkpoint\.device is {asked}, .* finds {found}; use cpu or auto"):
        resolve_device(asked)


@pytest.mark.parametrize("lookahead", ["auto", "1", "4", "32"])
def test_look_ahead_changes_no_token(heard: dict[str, Transcript | Failure], lookahead: str) -> None:
    assert tokens_of(results_of(digits(), f"stages.generate.lookahead={lookahead}")) == tokens_of(heard)


def test_a_checkpoint_that_lacks_something_is_refused_before_any_work(tiny_original: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_original, tmp_path / "broken"))
    (broken / "mimi.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"mimi\.safetensors is missing"):
        stages_of(f"checkpoint.source={broken}")


def test_the_fingerprint_of_a_run_follows_from_weights_and_decoding_options(tiny_original: Path) -> None:
    prints = [
        stages_of(*overrides).provenance("r").config_fingerprint
        for overrides in (
            (),
            ("stages.generate.slots=3", "stages.encode.rows=3"),
            ("stages.generate.alignment=bos-replaces-first",),
            (f"checkpoint.source={tiny_original}",),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_every_row_says_where_it_comes_from() -> None:
    stages = stages_of()
    provenance = stages.provenance("run-1")
    assert provenance.model_id == "demo"
    assert provenance.model_revision == fetch(CheckpointConfig(source="demo")).revision
    assert provenance.run_id == "run-1"


def _put(folder: Path, name: str, data: bytes) -> Source:
    (folder / name).write_bytes(data)
    [found] = discover([str(folder / name)], Storage()).found
    return found.source


def test_a_small_model_has_a_thread_of_its_own_and_a_large_one_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert stages_of().num_threads() == 1
    monkeypatch.setattr("pipeline.run._SMALL_MODEL_BYTES", 10)
    assert stages_of().num_threads() == 7
