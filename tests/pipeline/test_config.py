import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import RunConfig, decoding_settings, fingerprint, load_config
from pipeline.errors import ConfigError

# What users and scripts rely on: names, defaults and so meaning (contract, "Config").
PROMISED: dict[str, Any] = {
    "checkpoint": {"source": "kyutai/stt-2.6b-en", "revision": "main", "dtype": "auto", "device": "auto"},
    "input": {"uris": [], "shard_audio_hours": 1.0},
    "output": {"uri": "", "columns": []},
    "stages": {
        "load": {"cpus": 1.0},
        "encode": {"gpus": 0.2, "rows": "auto", "precision": "float32"},
        "generate": {
            "gpus": 0.8,
            "slots": "auto",
            "lookahead": "auto",
            "temperature": 0.0,
            "seed": 0,
            "alignment": "all-frames",
        },
    },
    "serve": {"host": "127.0.0.1", "port": 8000, "api_keys": []},
    "ray": {"address": None},
}


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(write(folder, text), overrides)
    return str(refused.value)


def holds(data: dict[str, Any], promised: dict[str, Any]) -> bool:
    return all(
        holds(data[key], value) if isinstance(value, dict) else data[key] == value for key, value in promised.items()
    )


def test_the_promised_keys_have_the_promised_defaults() -> None:
    assert holds(RunConfig().model_dump(mode="json"), PROMISED)


# Building tables of all of Unicode takes 20 seconds; these are the letters that YAML, JSON and shells trip over.
TEXT = st.text("ab 01é日😀:#'\"{}[]&*!|>%@`-?,~=\\\n\t", min_size=1)


@given(
    slots=st.just("auto") | st.integers(1, 10**6),
    source=TEXT,
    seed=st.integers(),
    uris=st.lists(TEXT),
    temperature=st.floats(0, 10),
)
def test_what_is_shown_can_be_loaded_and_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    slots: int | str,
    source: str,
    seed: int,
    uris: list[str],
    temperature: float,
) -> None:
    generate = {"slots": slots, "seed": seed, "temperature": temperature}
    config = RunConfig.model_validate(
        {"checkpoint": {"source": source}, "input": {"uris": uris}, "stages": {"generate": generate}}
    )
    shown = config.to_yaml()
    again = load_config(write(tmp_path_factory.mktemp("shown"), shown))
    assert again == config
    assert again.to_yaml() == shown


def test_an_override_says_the_same_as_the_file(tmp_path: Path) -> None:
    written = load_config(
        write(
            tmp_path,
            "checkpoint: {source: demo}\n"
            "input: {uris: [a, b], storage_options: {client_kwargs: {endpoint_url: 'http://here'}}}\n"
            "stages: {generate: {slots: 8}}\n"
            "ray: {address: null}\n",
        )
    )
    overrides = [
        "checkpoint.source=demo",
        "input.uris=[a, b]",
        "input.storage_options.client_kwargs.endpoint_url=http://here",
        "stages.generate.slots=8",
        "ray.address=null",
    ]
    assert load_config(None, overrides) == written
    assert load_config(write(tmp_path, ""), overrides) == written


def test_of_two_overrides_the_last_wins_and_any_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "checkpoint: {source: a/b, device: cpu}")
    config = load_config(path, ["checkpoint.source=c/d", "checkpoint.source=demo"])
    assert (config.checkpoint.source, config.checkpoint.device) == ("demo", "cpu")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "input:\noutput:\nstages:\n  load:\n  generate:\n"])
def test_what_is_left_empty_has_its_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text)) == RunConfig()


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("stages: {generate: {slot: 3}}", "stages.generate.slot: unknown key; did you mean stages.generate.slots?"),
        ("ouput: {uri: x}", "ouput: unknown key; did you mean output?"),
        ("slots: 8", "slots: unknown key; did you mean stages.generate.slots?"),
        ("checkpoint: {uris: [x]}", "checkpoint.uris: unknown key; did you mean input.uris?"),
        ("checkpoint: {zzz: 1}", "checkpoint.zzz: unknown key; known here: source, revision, dtype, device"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_is_named(tmp_path: Path, text: str, nearest: str) -> None:
    assert nearest in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {generate: {slots: -1}}", "slots: expected 'auto', or a number greater than or equal to 1; found -1"),
        ("stages: {generate: {slots: many}}", "slots: expected 'auto', or a valid integer; found 'many'"),
        ("stages: {load: {cpus: 0}}", "stages.load.cpus: expected a number greater than 0; found 0"),
        ("stages: {generate: {temperature: -0.5}}", "temperature: expected a number greater than or equal to 0"),
        ("stages: {generate: {temperature: .nan}}", "temperature: expected a finite number; found nan"),
        ("stages: {encode: {piece_seconds: .inf}}", "piece_seconds: expected 'auto', or a finite number; found inf"),
        ("stages: {encode: {rows: 0}}", "rows: expected 'auto', or a number greater than or equal to 1; found 0"),
        ("stages: {encode: {precision: fp16}}", "precision: expected 'float32', 'tf32' or 'bfloat16'; found 'fp16'"),
        ("stages: {generate: {alignment: some-frames}}", "expected 'all-frames', 'bos-replaces-first' or 'first-frame"),
        ("checkpoint: {device: gpu}", "checkpoint.device: expected auto, cpu, cuda or cuda:N; found 'gpu'"),
        ("checkpoint: {dtype: fp16}", "checkpoint.dtype: expected 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("checkpoint: {revision: 1234567}", "checkpoint.revision: expected text; put it in quotes; found 1234567"),
        ("checkpoint: {source: ''}", "checkpoint.source: expected at least 1 character"),
        ("checkpoint: demo", "checkpoint: expected a section, with its keys indented below it; found 'demo'"),
        ("input: {uris: s3://bucket/audio/}", "input.uris: expected a list, e.g. [a, b]; found 's3://bucket/audio/'"),
        ("input: {uris: ['']}", "input.uris.0: expected at least 1 character"),
        ("output: {columns: [token]}", "output.columns.0: expected 'tokens', 'codes' or 'audio'; found 'token'"),
        ("serve: {port: 70000}", "serve.port: expected a number less than or equal to 65535; found 70000"),
        ("1: x", "1: expected names as keys; found 1"),
        ("- checkpoint", "holds a list, expected sections such as `checkpoint:`"),
        ("input: {uris: [", "is not valid YAML"),
        ("input:\n\turis: x", "is not valid YAML"),
        ("checkpoint: {revision: 2024-13-45}", "is not valid YAML: month must be in 1..12"),
        ("output: {uri: a}\noutput: {uri: b}", "the key 'output' comes twice"),
        ("output: {uri: a, uri: b}", "the key 'uri' comes twice"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path: Path, text: str, said: str) -> None:
    message = refusal(tmp_path, text)
    assert said in message
    assert "config.yaml" in message


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "stages: {generate: {slots: -1, seed: x}}\nsrve: {}")
    assert all(name in message for name in ("slots", "seed", "srve"))


@pytest.mark.parametrize("override", ["noequals", "=5", "..=1", "stages.=1", ""])
def test_an_override_without_key_and_value_shows_how_one_looks(override: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value, e\.g\. -s stages\.generate\.slots=8"):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.generate.slots=[", "the value is not valid YAML"),
        ("checkpoint.source.name=x", "source"),
        ("nowhere.key=1", "nowhere: unknown key"),
    ],
)
def test_a_wrong_override_is_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + said):
        load_config(None, ["checkpoint.source=demo", override])


def test_a_file_that_cannot_be_read_is_the_users_to_correct(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file at .*configs/"):
        load_config(str(tmp_path / "nope.yaml"))
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"output: {uri: \xff}")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize("section", ["checkpoint", "input", "output"])
def test_secrets_are_neither_shown_nor_repeated_in_a_complaint(tmp_path: Path, section: str) -> None:
    config = load_config(write(tmp_path, f"{section}: {{storage_options: {{key: hush, deep: {{secret: hush}}}}}}"))
    assert getattr(config, section).storage_options["key"] == "hush"
    assert "hush" not in config.to_yaml()
    assert "hush" not in repr(config)
    assert yaml.safe_load(config.to_yaml())[section]["storage_options"] == {"key": "***", "deep": "***"}
    assert "hush" not in refusal(tmp_path, f"{section}: {{storage_options: hush}}")


def test_passwords_in_uris_are_not_written_down(tmp_path: Path) -> None:
    uri = "https://ali:hush@host/x?part=1&X-Amz-Signature=hush"
    text = f"checkpoint: {{source: '{uri}'}}\ninput: {{uris: ['{uri}']}}\noutput: {{uri: '{uri}'}}"
    config = load_config(write(tmp_path, text))
    assert config.output.uri == uri
    assert "hush" not in config.to_yaml()
    assert config.to_yaml().count("https://***@host/x?part=1&X-Amz-Signature=***") == 3
    settings = decoding_settings(config, dtype="float32", model_revision="1", version="1")
    assert "hush" not in str(settings)


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.source=org/name",
        "stages.encode.window=ring",
        "stages.encode.precision=tf32",
        "stages.encode.precision=bfloat16",
        "stages.generate.temperature=0.5",
        "stages.generate.alignment=bos-replaces-first",
    ],
)
def test_what_can_change_a_transcript_changes_the_fingerprint(override: str) -> None:
    assert _fingerprint() != _fingerprint(override)


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.revision=v1",  # what it resolved to counts, not its name
        "checkpoint.device=cpu",
        "input.uris=[a]",
        "input.shard_audio_hours=0.1",
        "output.uri=elsewhere",
        "output.columns=[tokens]",
        "stages.encode.rows=7",
        "stages.encode.piece_seconds=1",
        "stages.encode.precision=float32",
        "stages.generate.slots=3",
        "stages.generate.lookahead=1",
        "stages.generate.seed=7",  # greedy decoding never asks for it
        "stages.load.cpus=2",
        "ray.lanes=2",
    ],
)
def test_what_only_changes_speed_or_place_does_not(override: str) -> None:
    assert _fingerprint() == _fingerprint(override)


def test_the_seed_counts_once_tokens_are_sampled() -> None:
    assert _fingerprint("stages.generate.temperature=1") != _fingerprint(
        "stages.generate.temperature=1", "stages.generate.seed=7"
    )


def test_precision_revision_and_version_are_part_of_the_fingerprint() -> None:
    prints = {
        fingerprint(decoding_settings(RunConfig(), dtype=dtype, model_revision=revision, version=version))
        for dtype in ("float32", "bfloat16")
        for revision in ("a", "b")
        for version in ("1", "2")
    }
    assert len(prints) == 8


def test_settings_survive_their_journey_through_json() -> None:
    settings = decoding_settings(RunConfig(), dtype="float32", model_revision="a", version="1")
    assert fingerprint(json.loads(json.dumps(settings))) == fingerprint(settings)


def _fingerprint(*overrides: str) -> str:
    return fingerprint(
        decoding_settings(load_config(None, overrides), dtype="float32", model_revision="a", version="1")
    )
