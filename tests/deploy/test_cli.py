import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from deploy import cli
from pipeline.config import RunConfig, load_config
from pipeline.write import schema
from tests.make_audio import sine, wav

ROOT = Path(__file__).parent.parent.parent
DIGITS = ROOT / "tests" / "data" / "speech" / "digits"
CLIP, TEXT = DIGITS / "test_seen_7.wav", "four nine four"
OTHER, OTHER_TEXT = DIGITS / "test_seen_2.wav", "seven seven five five"
VERBS = ("transcribe", "run", "plan", "status", "fetch", "bench")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    code: object
    out: str
    err: str


Kikitori = Callable[..., Result]


@pytest.fixture
def kikitori(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Kikitori]:
    """The command, in this process; what it sets up in the process is put back."""
    loggers = [logging.getLogger(name) for name in ("pipeline", "actors", "deploy", "huggingface_hub")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    on_term = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["kikitori", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Result(code=ended.value.code, out=captured.out, err=captured.err)

    yield call
    signal.signal(signal.SIGTERM, on_term)
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate


def transcribe(kikitori: Kikitori, *arguments: object) -> Result:
    return kikitori("transcribe", "--model", "demo", "--device", "cpu", *arguments)


def put(folder: Path, name: str, data: bytes | None = None) -> Path:
    path = folder / name
    path.write_bytes(CLIP.read_bytes() if data is None else data)
    return path


def write_config(folder: Path, *, inputs: Path | str = DIGITS, more: str = "") -> Path:
    path = folder / "config.yaml"
    path.write_text(
        f"checkpoint: {{source: demo, device: cpu}}\n"
        f"input: {{uris: [{json.dumps(str(inputs))}]}}\n"
        f"output: {{uri: {json.dumps(str(folder / 'out'))}}}\n{more}",
        encoding="utf-8",
    )
    return path


def rows_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


# --- What every verb has


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_the_common_options(kikitori: Kikitori, verb: str) -> None:
    result = kikitori(verb, "--help")
    assert (result.code, result.err) == (0, "")
    assert all(option in result.out for option in ("--help", "--json", "-s, --set", "KEY=VALUE"))
    described = result.out.partition("\n\n")[2].partition("Options:")[0].strip()
    assert len(described) > 20


def test_the_command_lists_its_verbs(kikitori: Kikitori) -> None:
    result = kikitori("--help")
    assert result.code == 0
    assert all(re.search(rf"^  {verb} +\w", result.out, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize(
    "arguments",
    [(), ("frobnicate",), ("plan",), ("transcribe",), ("plan", "--frob", "x"), ("transcribe", "a", "--format", "mp4")],
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(kikitori: Kikitori, arguments: tuple[str, ...]) -> None:
    result = kikitori(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: kikitori" in result.err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_wrong_config_is_a_usage_error_that_names_the_nearest_key(
    kikitori: Kikitori, tmp_path: Path, verb: str, flags: tuple[str, ...]
) -> None:
    target = CLIP if verb == "transcribe" else write_config(tmp_path)
    result = kikitori(verb, target, "-s", "stages.generate.slotz=8", *flags)
    assert (result.code, result.out) == (2, "")
    assert "stages.generate.slotz: unknown key; did you mean stages.generate.slots?" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["run", "plan", "status", "fetch"])
def test_a_config_that_is_not_there_is_a_usage_error(kikitori: Kikitori, verb: str, tmp_path: Path) -> None:
    result = kikitori(verb, tmp_path / "nope.yaml")
    assert (result.code, result.out) == (2, "")
    assert "nope.yaml" in result.err


def test_help_does_not_wait_for_torch_or_ray() -> None:
    code = "import sys, deploy.cli; print(sorted({'torch', 'ray', 'av', 'pyarrow'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_what_we_did_not_expect_is_a_system_failure_and_says_where_when_asked(
    kikitori: Kikitori, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr("pipeline.run.build_stages", broken)
    result = transcribe(kikitori, CLIP)
    assert (result.code, result.out) == (3, "")
    assert "RuntimeError: a wheel came off" in result.err
    assert "Traceback" not in caplog.text
    transcribe(kikitori, CLIP, "-v")
    assert "in broken" in caplog.text


# --- transcribe


def test_one_input_prints_its_text_alone(kikitori: Kikitori) -> None:
    assert transcribe(kikitori, CLIP) == Result(code=0, out=f"{TEXT}\n", err="")


def test_several_inputs_print_a_line_each_in_the_order_they_were_named(kikitori: Kikitori) -> None:
    result = transcribe(kikitori, CLIP, OTHER, CLIP)
    assert result == Result(code=0, out=f"{CLIP}\t{TEXT}\n{OTHER}\t{OTHER_TEXT}\n", err="")


def test_a_path_is_printed_as_it_was_named(kikitori: Kikitori, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "b.wav")
    put(tmp_path, "a.wav")
    monkeypatch.chdir(tmp_path)
    result = transcribe(kikitori, "b.wav", "./a.wav")
    assert result.out == f"b.wav\t{TEXT}\n./a.wav\t{TEXT}\n"


@pytest.mark.parametrize("form", ["glob", "folder", "file://"])
def test_globs_folders_and_uris_stand_for_their_files(kikitori: Kikitori, tmp_path: Path, form: str) -> None:
    paths = [put(tmp_path, "a.wav"), put(tmp_path, "b.wav")]
    put(tmp_path, "notes.txt", b"not audio")
    named = {"glob": [tmp_path / "*.wav"], "folder": [tmp_path], "file://": [f"file://{path}" for path in paths]}
    result = transcribe(kikitori, *named[form])
    assert result.code == 0
    assert [line.removeprefix("file://") for line in result.out.splitlines()] == [f"{path}\t{TEXT}" for path in paths]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("sp ace ünï 日本 😀.wav", None),
        ("[1].wav", None),
        ("new\nline.wav", "new\\nline.wav"),
        ("tab\there.wav", "tab\\there.wav"),
        (os.fsdecode(b"not-utf8-\xff.wav"), "not-utf8-\\udcff.wav"),
    ],
)
def test_a_file_may_have_any_name_and_has_one_line(
    kikitori: Kikitori, tmp_path: Path, name: str, shown: str | None
) -> None:
    result = transcribe(kikitori, put(tmp_path, name), CLIP)
    assert result.code == 0
    assert result.out == f"{tmp_path}/{shown or name}\t{TEXT}\n{CLIP}\t{TEXT}\n"
    [row, _] = rows_of(transcribe(kikitori, tmp_path / name, CLIP, "--json"))
    assert row["status"] == "ok"


def test_a_name_may_begin_with_a_dash(kikitori: Kikitori, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "-dash.wav")
    monkeypatch.chdir(tmp_path)
    assert transcribe(kikitori, "--", "-dash.wav").out == f"{TEXT}\n"


@pytest.mark.parametrize("flags", [("--json",), ("--format", "json")])
def test_json_is_an_output_row_per_line_and_nothing_else(kikitori: Kikitori, flags: tuple[str, ...]) -> None:
    result = transcribe(kikitori, CLIP, OTHER, "/nowhere/x.wav", "-s", "output.columns=[tokens, codes]", *flags)
    assert (result.code, result.err) == (1, "")
    rows = rows_of(result)
    assert [row["text"] for row in rows] == [TEXT, OTHER_TEXT, None]
    assert [row["status"] for row in rows] == ["ok", "ok", "error"]
    assert all(list(row) == schema(("tokens", "codes")).names for row in rows)
    for row in rows[:2]:
        assert row["text"] == " ".join(word["word"] for word in row["words"])
        assert len(row["tokens"]) == len(row["codes"]) + 1
        assert {len(frame) for frame in row["codes"]} == {8}


def test_the_same_input_has_the_same_id_however_it_is_spelt(
    kikitori: Kikitori, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, "a.wav")
    monkeypatch.chdir(tmp_path)
    spellings = ["a.wav", path, f"file://{path}", "./././a.wav", "*.wav", "."]
    rows = [row for spelling in spellings for row in rows_of(transcribe(kikitori, spelling, "--json"))]
    assert {row["id"] for row in rows} == {rows[0]["id"]}
    assert {row["source_uri"] for row in rows} == {str(path)}


@pytest.mark.parametrize(
    ("form", "head"), [("srt", "1\n00:00:00,000 --> 00:00:0"), ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:0")]
)
def test_captions_of_one_input(kikitori: Kikitori, form: str, head: str) -> None:
    result = transcribe(kikitori, CLIP, "--format", form)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(head)
    assert result.out.endswith(f"\n{TEXT}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((CLIP, OTHER, "--format", "srt"), "--format srt is one file of captions, but 2 inputs were given"),
        ((CLIP, "--json", "--format", "vtt"), "--json and --format vtt were both given; choose one"),
        (("",), "an input is the empty string"),
        ((DIGITS / "*.xyz",), "matches no file"),
        (("/nowhere/at/all",), "there is no folder or file /nowhere/at/all"),
        ((CLIP, "-s", "noequals"), "expected section.key=value"),
        ((CLIP, "-s", "output.columns=[audio]"), "audio cannot be written yet"),
        ((CLIP, "-s", "stages.generate.lookahead=0"), "stages.generate.lookahead: expected"),
        ((CLIP, "-s", "checkpoint.device=cuda:99"), "checkpoint.device is cuda:99"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    kikitori: Kikitori, arguments: tuple[object, ...], said: str
) -> None:
    result = transcribe(kikitori, *arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_one_bad_input_does_not_stop_the_others(kikitori: Kikitori, tmp_path: Path) -> None:
    bad = {
        tmp_path / "missing.wav": "NOT_FOUND",
        put(tmp_path, "empty.wav", b""): "EMPTY_AUDIO",
        put(tmp_path, "one.wav", wav(np.zeros(1, np.float32))): "EMPTY_AUDIO",
        put(tmp_path, "text.wav", b"Dear Sir or Madam"): "UNSUPPORTED_FORMAT",
        put(tmp_path, "cut.wav", CLIP.read_bytes()[:30_000]): "TRUNCATED",
    }
    result = transcribe(kikitori, *bad, CLIP)
    assert (result.code, result.out) == (1, f"{CLIP}\t{TEXT}\n")
    for path, code in bad.items():
        assert f"kikitori: {path}: {code}: " in result.err
    rows = rows_of(transcribe(kikitori, *bad, CLIP, "--json"))
    assert [row["error_code"] for row in rows] == [*bad.values(), None]
    assert all((row["text"] is None) == (row["status"] == "error") for row in rows)


def test_silence_is_an_empty_text_and_a_success(kikitori: Kikitori, tmp_path: Path) -> None:
    silent = put(tmp_path, "silent.wav", wav(np.zeros(48_000, np.float32)))
    assert transcribe(kikitori, silent) == Result(code=0, out="\n", err="")
    [row] = rows_of(transcribe(kikitori, silent, "--json"))
    assert (row["text"], row["words"], row["avg_logprob"]) == ("", [], None)


def test_an_override_decides_over_a_flag(kikitori: Kikitori) -> None:
    result = kikitori(
        "transcribe", "--model", "/nowhere", CLIP, "-s", "checkpoint.source=demo", "-s", "checkpoint.device=cpu"
    )
    assert (result.code, result.out) == (0, f"{TEXT}\n")


def test_a_model_may_be_a_folder_of_any_name(kikitori: Kikitori, tmp_path: Path, tiny_original: Path) -> None:
    """A path with an emoji once became two surrogates on its way through YAML."""
    folder = shutil.copytree(tiny_original, tmp_path / "ünï # 😀: x")
    [row] = rows_of(kikitori("transcribe", "--model", folder, "--device", "cpu", "--json", CLIP))
    assert (row["status"], row["model_id"]) == ("ok", str(folder))


def test_a_model_that_is_nowhere_is_a_usage_error_that_says_what_to_do(
    kikitori: Kikitori, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for model, said in [
        ("nobody/nothing", "Connect once and run `kikitori fetch`, or set checkpoint.source to a local folder"),
        ("/nowhere", "is not a folder here, and not a hub id"),
        ("", "checkpoint.source: expected at least 1 character"),
    ]:
        result = kikitori("transcribe", "--model", model, CLIP)
        assert (result.code, result.out) == (2, "")
        assert said in result.err


def test_a_model_that_lacks_a_tensor_is_a_usage_error_that_names_it(
    kikitori: Kikitori, tmp_path: Path, tiny_original: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_original, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_linear.weight"]
    save_file(tensors, folder / "model.safetensors")
    result = kikitori("transcribe", "--model", folder, CLIP)
    assert (result.code, result.out) == (2, "")
    assert "missing: text_linear.weight [64, 64]" in result.err


# --- plan, status, fetch


def test_the_shown_config_is_complete_and_loads_again(kikitori: Kikitori, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    result = kikitori("plan", path, "--show-config", "-s", "stages.generate.slots=5")
    assert (result.code, result.err) == (0, "")
    (tmp_path / "shown.yaml").write_text(result.out)
    assert load_config(str(tmp_path / "shown.yaml")) == load_config(str(path), ["stages.generate.slots=5"])
    assert yaml.safe_load(result.out).keys() == RunConfig.model_fields.keys()
    assert kikitori("plan", tmp_path / "shown.yaml", "--show-config").out == result.out
    as_json = kikitori("plan", tmp_path / "shown.yaml", "--show-config", "--json")
    assert json.loads(as_json.out) == yaml.safe_load(result.out)
    assert not (tmp_path / "out").exists()


def test_plan_writes_what_status_reads(kikitori: Kikitori, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    before = kikitori("status", path)
    assert (before.code, before.out) == (2, "")
    assert "run `kikitori plan` or `kikitori run` first" in before.err
    [planned] = rows_of(kikitori("plan", path, "--json"))
    [found] = rows_of(kikitori("status", path, "--json"))
    assert planned["inputs"] == found["inputs"] == len(list(DIGITS.iterdir()))
    assert found.items() <= planned.items()
    assert not found["complete"]
    assert (found["committed_shards"], found["remaining_shards"], found["rows"]) == (0, found["shards"], 0)
    assert planned["estimated_audio_hours"] == pytest.approx(0.0107, rel=0.1)  # 39 s
    manifests = list((tmp_path / "out" / "_kikitori" / "manifest").iterdir())
    assert sum(pq.read_metadata(one).num_rows for one in manifests) == planned["inputs"]
    [again] = rows_of(kikitori("plan", path, "--json"))
    assert again == planned


@pytest.mark.parametrize("verb", ["plan", "status"])
def test_a_result_for_people_names_the_place_as_it_is(kikitori: Kikitori, tmp_path: Path, verb: str) -> None:
    """Square brackets in a path once were taken for markup, and the command failed."""
    folder = tmp_path / "[red] [" / "x]"
    folder.mkdir(parents=True)
    path = write_config(folder)
    kikitori("plan", path)
    result = kikitori(verb, path)
    assert result.code == 0
    assert "[red] [/x]/out" in re.sub(r" *│\n│ +│ ", "", result.out)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["output.uri="], "output.uri is empty"),
        (["input.uris=[]"], "input.uris is empty"),
        (["output.columns=[audio]"], "audio cannot be written yet"),
        (["output.uri={folder}/config.yaml/out"], "cannot write to {folder}/config.yaml/out"),
        (["input.uris=[{folder}/empty]"], "{folder}/empty holds no file"),
        (["input.uris=[{folder}/texts]"], "no audio in {folder}/texts"),
    ],
)
def test_a_plan_that_cannot_be_made_is_a_usage_error(
    kikitori: Kikitori, tmp_path: Path, overrides: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    put(tmp_path / "texts", "notes.txt", b"not audio")
    arguments = [part for one in overrides for part in ("-s", one.format(folder=tmp_path))]
    result = kikitori("plan", write_config(tmp_path), *arguments)
    assert (result.code, result.out) == (2, "")
    assert said.format(folder=tmp_path) in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--retry-errors", "NOPE"], "--retry-errors: found 'NOPE'; the error codes are NOT_FOUND, "),
        (["--retry-errors", ""], "--retry-errors: found ''"),
        (["--max-error-rate", "1.5"], "0<=x<=1"),
        (["--max-error-rate", "nan"], "--max-error-rate is not a number"),
    ],
)
def test_a_run_that_cannot_be_meant_is_a_usage_error(
    kikitori: Kikitori, tmp_path: Path, arguments: list[str], said: str
) -> None:
    result = kikitori("run", write_config(tmp_path), *arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert not (tmp_path / "out").exists()


def test_status_names_the_versions_where_there_are_several(kikitori: Kikitori, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    kikitori("plan", path)
    assert rows_of(kikitori("status", path, "--json"))[0]["versions"] == []
    folder = tmp_path / "out" / "_kikitori" / "settings"
    folder.mkdir()
    for number in range(2):
        (folder / f"settings-{number:05d}.json").write_text(json.dumps({"settings": {"number": number}}))
    [found] = rows_of(kikitori("status", path, "--json"))
    assert [(version["number"], version["parts"]) for version in found["versions"]] == [(0, 0), (1, 0)]
    fingerprints = [version["config_fingerprint"] for version in found["versions"]]
    shown = re.sub(r" *│\n│ +│ ", " ", kikitori("status", path).out)
    assert f"{fingerprints[0]} (0 parts); {fingerprints[1]} (0 parts, in force)" in shown


def test_fetch_says_what_it_has_found(kikitori: Kikitori, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    [facts] = rows_of(kikitori("fetch", path, "--json"))
    assert (facts["model_id"], facts["format"]) == ("demo", "original")
    assert facts["folder"] == str(ROOT / "models" / "demo" / "original")
    shown = kikitori("fetch", path)
    assert (shown.code, shown.err) == (0, "")
    assert facts["model_revision"] in shown.out


# --- The process: what only a real one can show


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from deploy.cli import main; main()",
            "transcribe",
            "--model",
            "demo",
            *map(str, arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def test_a_signal_ends_it_soon_and_leaves_whole_lines(tmp_path: Path) -> None:
    endless = put(tmp_path, "endless.wav", wav(np.tile(sine(10.0, rate_hz=8000), 60), rate_hz=8000))
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    clip = put(tmp_path, "日本 ü.wav")
    # All at once, because most of the time goes into importing torch.
    started = {number: start(clip, endless, "-s", "stages.generate.slots=1") for number in codes}
    for number, process in started.items():
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{clip}\t{TEXT}\n"
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (codes[number], "")
        assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_accident(tmp_path: Path) -> None:
    copies = [put(tmp_path, f"{number}.wav") for number in range(8)]
    with start(*copies, "-s", "stages.generate.slots=1") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert err == ""


BENCH = ("--shape", "tiny", "--slots", "2", "--lookahead", "1,2", "--clips", "3", "--seconds", "2", "--repeats", "1")


def test_bench_prints_a_table_and_last_of_all_json(kikitori: Kikitori, tmp_path: Path) -> None:
    result = kikitori("bench", write_config(tmp_path), *BENCH)
    assert (result.code, result.err) == (0, "")
    *shown, last = result.out.splitlines()
    facts = json.loads(last)
    assert [(row["slots"], row["lookahead"]) for row in facts["engine"]] == [(2, 1), (2, 2)]
    assert any("of limit" in line for line in shown)
    assert any(line.startswith("pipeline, 2 slots") for line in shown)


def test_bench_prints_only_json_when_asked(kikitori: Kikitori, tmp_path: Path) -> None:
    result = kikitori("bench", write_config(tmp_path), *BENCH, "--json")
    assert result.code == 0
    assert json.loads(result.out)["workload"]["clips"] == 3


def test_bench_of_a_checkpoint_hears_the_inputs(kikitori: Kikitori, tmp_path: Path) -> None:
    put(tmp_path, "clip.wav")
    result = kikitori("bench", write_config(tmp_path, inputs=tmp_path), *BENCH[2:], "--json")
    facts = json.loads(result.out)
    assert (facts["model"], facts["workload"]["name"], facts["workload"]["clips"]) == ("demo", "inputs", 1)
    assert "align" in facts["pipeline"]["stage_seconds"]


@pytest.mark.parametrize("numbers", ["0", "8,x", "", "8,,16", "-1"])
def test_bench_wants_whole_numbers(kikitori: Kikitori, tmp_path: Path, numbers: str) -> None:
    result = kikitori("bench", write_config(tmp_path), "--slots", numbers)
    assert (result.code, result.out) == (2, "")
    assert "expected whole numbers from 1" in result.err


def test_bench_says_what_peers_need(kikitori: Kikitori, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "moshi" else name)
    result = kikitori("bench", write_config(tmp_path), *BENCH, "--peers")
    assert (result.code, result.out) == (2, "")
    assert "--peers needs moshi, not installed here" in result.err
