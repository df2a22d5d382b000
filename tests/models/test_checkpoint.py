"""Both formats load into the same model; every way in which a folder can be wrong is named."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import checkpoint_files, open_checkpoint
from models.config import FormatError
from tests.tiny import (
    FRAME_SAMPLES,
    TEXT_CARD,
    clip,
    original_config,
    sentencepiece_model,
    trfs_config,
    write_original,
    write_trfs,
)

Damage = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A folder of one's own, to be damaged."""
    return write_original(tmp_path / "original")


@pytest.fixture
def trfs(tmp_path: Path) -> Path:
    return write_trfs(tmp_path / "trfs")


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def rewrite(file: Path, damage: Damage) -> None:
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_both_formats_load_into_the_same_model(original: Path, tmp_path: Path, shards: int) -> None:
    """Bit for bit, so tokens and codes are equal too."""
    first, second = open_checkpoint(original), open_checkpoint(write_trfs(tmp_path / "trfs", shards=shards))
    assert (first.format, second.format) == ("original", "trfs")
    assert (first.decoder, first.mimi) == (second.decoder, second.mimi)
    assert len(second.decoder_files) == shards
    assert same(state(first.load_decoder()), state(second.load_decoder()))
    assert same(state(first.load_mimi()), state(second.load_mimi()))
    samples = torch.from_numpy(clip(0, 20 * FRAME_SAMPLES))[None]
    codes = first.load_mimi().encode(samples)
    assert torch.equal(codes, second.load_mimi().encode(samples))
    assert second.speech.hf_bos_row == TEXT_CARD
    assert first.speech.hf_bos_row is None


def test_another_seed_is_another_model(original: Path, tmp_path: Path) -> None:
    other = open_checkpoint(write_original(tmp_path / "other", seed=1))
    assert not same(state(open_checkpoint(original).load_decoder()), state(other.load_decoder()))
    assert not same(state(open_checkpoint(original).load_mimi()), state(other.load_mimi()))


def test_modules_come_frozen_and_ready(original: Path) -> None:
    checkpoint = open_checkpoint(original)
    for module in (checkpoint.load_decoder(), checkpoint.load_mimi()):
        assert not module.training
        assert not any(weight.requires_grad or weight.is_meta for weight in module.parameters())


def test_bfloat16_is_the_decoders_alone(original: Path) -> None:
    checkpoint = open_checkpoint(original)
    rounded = {name: weight.bfloat16() for name, weight in checkpoint.load_decoder().state_dict().items()}
    assert same(state(checkpoint.load_decoder(dtype=torch.bfloat16)), rounded)
    assert {weight.dtype for weight in checkpoint.load_mimi().parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_files_of_any_precision(original: Path, dtype: torch.dtype) -> None:
    exact = open_checkpoint(original).load_decoder().state_dict()
    rewrite(
        original / "model.safetensors", lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()})
    )
    loaded = open_checkpoint(original).load_decoder().state_dict()
    assert same(dict(loaded), {name: weight.to(dtype).float() for name, weight in exact.items()})


def test_fewer_codebooks_are_read_than_the_codec_has(original: Path) -> None:
    """As when a decoder was trained on the first ones only."""
    edit(original / "config.json", n_q=5, delays=[0] * 6)
    rewrite(original / "model.safetensors", lambda tensors: [tensors.pop(f"emb.{book}.weight") for book in (5, 6, 7)])
    checkpoint = open_checkpoint(original)
    samples = torch.from_numpy(clip(0, 9 * FRAME_SAMPLES))[None]
    assert checkpoint.load_mimi().encode(samples).shape == (1, 5, 9)
    assert checkpoint.load_decoder().config.num_codebooks == 5


def test_the_weights_do_not_hold_on_to_the_file(original: Path) -> None:
    """A table of its own for every parameter: no view into a larger one, which would keep all of it in memory."""
    for weight in open_checkpoint(original).load_decoder().parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "config.json") in message
    assert "no such folder" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "mimi.safetensors", "tokenizer.model"])
def test_a_file_that_is_missing(original: Path, name: str) -> None:
    (original / name).unlink()
    message = refusal(original)
    assert f"{original / name} is missing" in message
    assert "the folder holds: " in message
    assert "mimi_config.json" in message


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_a_file_of_the_trfs_format_that_is_missing(trfs: Path, name: str) -> None:
    (trfs / name).unlink()
    assert name in refusal(trfs)
    assert "is missing" in refusal(trfs)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = write_trfs(tmp_path, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(folder)


def test_pickles_are_not_read(trfs: Path) -> None:
    (trfs / "model.safetensors").rename(trfs / "pytorch_model.bin")
    message = refusal(trfs)
    assert "model.safetensors" in message
    assert "pytorch_model.bin" in message


@pytest.mark.parametrize("content", ["", "{", '"text"', "[1]", "\x00\xff"])
def test_a_config_that_is_not_an_object(original: Path, content: str) -> None:
    (original / "config.json").write_text(content, encoding="latin-1")
    assert str(original / "config.json") in refusal(original)


def test_the_config_of_another_model(original: Path) -> None:
    (original / "config.json").write_text('{"model_type": "whisper", "d_model": 384}')
    assert "its keys are d_model, model_type" in refusal(original)


def test_the_generation_config_may_be_missing(trfs: Path) -> None:
    (trfs / "generation_config.json").unlink()
    assert open_checkpoint(trfs).speech.hf_bos_row == TEXT_CARD


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("out_norm.alpha"), "missing: out_norm.alpha [1, 1, 64]"),
        (lambda t: t.update({"depformer.0.weight": torch.zeros(2)}), "left over: depformer.0.weight [2]"),
        (
            lambda t: t.update({"emb.3.weight": torch.zeros(64, 64)}),
            "wrong shape: emb.3.weight is [64, 64], expected [65, 64]",
        ),
        (
            lambda t: t.update({"text_linear.weight": torch.zeros(64, 64, dtype=torch.int8)}),
            "wrong dtype: text_linear.weight is I8, expected one of BF16, F16, F32, F64",
        ),
        (lambda t: t.update({"extra_heads.0.weight": torch.zeros(6, 64)}), "left over: extra_heads.0.weight [6, 64]"),
    ],
)
def test_a_tensor_that_is_wrong(original: Path, damage: Damage, message: str) -> None:
    rewrite(original / "model.safetensors", damage)
    assert message in refusal(original)
    assert str(original / "model.safetensors") in refusal(original)


def test_tensors_of_mimi_are_checked_too(original: Path, trfs: Path) -> None:
    rewrite(original / "mimi.safetensors", lambda tensors: tensors.pop("encoder.model.0.conv.conv.bias"))
    assert "missing: encoder.model.0.conv.conv.bias [4]" in refusal(original)
    rewrite(trfs / "model.safetensors", lambda tensors: tensors.pop("codec_model.encoder.layers.0.conv.bias"))
    assert "missing: codec_model.encoder.layers.0.conv.bias [4]" in refusal(trfs)


def test_everything_that_is_wrong_is_said_at_once(original: Path) -> None:
    rewrite(original / "model.safetensors", lambda tensors: [tensors.pop(f"emb.{book}.weight") for book in range(8)])
    assert refusal(original).count("missing: ") == 8


def test_a_config_that_does_not_fit_its_file(original: Path) -> None:
    edit(original / "config.json", num_layers=3)
    message = refusal(original)
    assert "missing: transformer.layers.2.norm1.alpha" in message


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_file_that_was_cut_short(original: Path, kept: float) -> None:
    file = original / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept if kept > 1 or kept == 0 else kept * len(content))])
    assert f"{file} is not a whole safetensors file" in refusal(original)


def test_a_tokenizer_that_is_none(original: Path, trfs: Path) -> None:
    (original / "tokenizer.model").write_bytes(b"not a model")
    (trfs / "tokenizer.json").write_text("{}")
    for folder in (original, trfs):
        with pytest.raises(FormatError, match="is not a tokenizer"):
            open_checkpoint(folder).load_tokenizer()


def test_a_tokenizer_of_another_model(original: Path) -> None:
    (original / "tokenizer.model").write_bytes(sentencepiece_model(TEXT_CARD - 10))
    with pytest.raises(FormatError, match=r"has 54 pieces, .*64 text ids"):
        open_checkpoint(original).load_tokenizer()


def test_a_tokenizer_of_a_few_ids_more_or_less_is_taken(original: Path) -> None:
    (original / "tokenizer.model").write_bytes(sentencepiece_model(TEXT_CARD - 2))
    assert open_checkpoint(original).load_tokenizer().is_special(TEXT_CARD - 1)


def test_the_files_to_ask_a_repository_for(original: Path, trfs: Path) -> None:
    """All that is opened, and nothing that could be a pickle."""
    asked = checkpoint_files(original_config())
    assert set(asked) == {entry.name for entry in original.iterdir()}
    for pattern in checkpoint_files(trfs_config()):
        assert not pattern.endswith((".bin", ".pt"))
    found = {entry.name for pattern in checkpoint_files(trfs_config()) for entry in trfs.glob(pattern)}
    assert found == {entry.name for entry in trfs.iterdir()}


def test_nothing_of_torchs_compiler_is_loaded_with_the_weights(tiny_original: Path) -> None:
    """It takes two seconds of a core, in every process that decodes."""
    code = (
        "import sys\n"
        "from models.checkpoint import open_checkpoint\n"
        f"checkpoint = open_checkpoint({str(tiny_original)!r})\n"
        "checkpoint.load_decoder(), checkpoint.load_mimi()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "False\n", done.stderr
