"""Names and shapes of stored tensors at released size, and what is made of them."""

import math
from collections.abc import Sequence

import pytest
import torch

from models.config import (
    RELEASED_MIMI,
    decoder_config_from_original,
    mimi_config_from_original,
)
from models.decoder import Decoder
from models.mimi import MimiEncoder
from models.names import (
    Rule,
    decoder_rules_original,
    decoder_rules_trfs,
    is_not_needed,
    mimi_rules_original,
    mimi_rules_trfs,
)
from tests.models.test_config import STT_1B, STT_2_6B
from tests.tiny import decoder_tensors, mimi_tensors, original_config, original_mimi_config

BIG = decoder_config_from_original(STT_2_6B)
SMALL = decoder_config_from_original(STT_1B)
CODEC = mimi_config_from_original(RELEASED_MIMI, num_codebooks=32)


def stored(rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    return {name: shape for rule in rules for name, shape in rule.sources}


def size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_the_file_of_the_released_2_6b() -> None:
    """323 tensors, and bytes that leave 37,688 of its 5,234,275,128 for the header."""
    shapes = stored(decoder_rules_original(BIG))
    assert len(shapes) == 323
    assert 5_234_275_128 - 2 * size(shapes) == 37_688
    layer = "transformer.layers.47."
    assert {name: shape for name, shape in shapes.items() if name.startswith(layer)} == {
        layer + "norm1.alpha": (1, 1, 2048),
        layer + "self_attn.in_proj_weight": (6144, 2048),
        layer + "self_attn.out_proj.weight": (2048, 2048),
        layer + "norm2.alpha": (1, 1, 2048),
        layer + "gating.linear_in.weight": (11264, 2048),
        layer + "gating.linear_out.weight": (2048, 5632),
    }
    assert {name: shape for name, shape in shapes.items() if not name.startswith("transformer.")} == {
        "text_emb.weight": (4001, 2048),
        "out_norm.alpha": (1, 1, 2048),
        "text_linear.weight": (4000, 2048),
        **{f"emb.{book}.weight": (2049, 2048) for book in range(32)},
    }


def test_the_file_of_the_released_1b() -> None:
    shapes = stored(decoder_rules_original(SMALL))
    assert (len(shapes), size(shapes)) == (131, 989_204_480)


@pytest.mark.parametrize(("config", "num_rows"), [(BIG, 69_570), (SMALL, 73_570)])
def test_the_shared_table_of_the_converted_checkpoints(config, num_rows: int) -> None:
    """The row after the last codebook's is padding, the id that transformers calls audio_pad_token_id."""
    shapes = stored(decoder_rules_trfs(config))
    assert shapes["model.embed_tokens.embed_tokens.weight"] == (num_rows, 2048)
    assert shapes["lm_head.weight"] == (config.text_card + 1, 2048)
    assert len(shapes) == 3 + 8 * config.num_layers


def test_the_encoding_half_of_the_released_mimi() -> None:
    original, converted = stored(mimi_rules_original(CODEC)), stored(mimi_rules_trfs(CODEC))
    assert size(original) == size(converted) == 55_972_128
    assert (len(original), len(converted)) == (175, 175 + 2 * CODEC.num_layers)  # q, k and v apart
    assert all(name.startswith("codec_model.") for name in converted)
    assert original["encoder.model.12.conv.conv.weight"] == (1024, 512, 16)
    assert converted["codec_model.encoder.layers.12.conv.weight"] == (1024, 512, 16)
    assert original["downsample.conv.conv.conv.weight"] == (512, 512, 4)


def test_the_rules_fill_the_modules() -> None:
    with torch.device("meta"):
        decoder, mimi = Decoder(BIG).state_dict(), MimiEncoder(CODEC).state_dict()
    for rules in (decoder_rules_original(BIG), decoder_rules_trfs(BIG)):
        assert sorted(rule.target for rule in rules) == sorted(decoder)
    for rules in (mimi_rules_original(CODEC), mimi_rules_trfs(CODEC)):
        assert sorted(rule.target for rule in rules) == sorted(mimi)


def test_the_rules_name_what_the_tiny_files_hold() -> None:
    decoder = stored(decoder_rules_original(decoder_config_from_original(original_config())))
    assert decoder == {name: tuple(tensor.shape) for name, tensor in decoder_tensors(0).items()}
    codec = stored(mimi_rules_original(mimi_config_from_original(original_mimi_config(), num_codebooks=8)))
    needed = {name: tuple(tensor.shape) for name, tensor in mimi_tensors(0).items() if not is_not_needed(name)}
    assert needed.items() <= codec.items()
    assert all("_codebook." in name for name in codec.keys() - needed.keys())


def test_rows_of_q_and_k_are_moved_within_their_heads() -> None:
    """moshi turns rows 2i and 2i + 1 of a head together, we turn i and i + E/2: here E = 16."""
    rules = decoder_rules_original(decoder_config_from_original(original_config()))
    rule = next(rule for rule in rules if rule.target == "transformer.layers.0.attention.qkv.weight")
    numbered = torch.arange(3 * 64.0)[:, None].expand(-1, 64)
    rows = rule.build([numbered])[:, 0].long()
    q, k, v = rows.chunk(3)
    head = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    assert q.tolist() == [16 * h + row for h in range(4) for row in head]
    assert (k - 64).tolist() == q.tolist()
    assert (v - 128).tolist() == list(range(64))


def test_an_unused_code_is_not_divided_by_zero() -> None:
    rules = mimi_rules_original(mimi_config_from_original(original_mimi_config(), num_codebooks=8))
    rule = next(rule for rule in rules if rule.target == "quantizer.semantic.codebooks_KVQ")
    usage = torch.tensor([2.0, 1e-7, 0.0, *[1.0] * 61])
    book = rule.build([torch.ones(64, 16), usage])
    assert book[0, :3, 0].tolist() == pytest.approx([0.5, 1e5, 1e5])


@pytest.mark.parametrize(
    "name",
    [
        "decoder.model.0.conv.conv.weight",
        "codec_model.decoder_transformer.layers.0.mlp.fc1.weight",
        "codec_model.upsample.conv.weight",
        "upsample.convtr.convtr.convtr.weight",
        "quantizer.rvq_rest.output_proj.weight",
        "quantizer.rvq_rest.vq.layers.30._codebook._initialized",
        "quantizer.rvq_rest.vq.layers.30._codebook.embedding_sum",
        "codec_model.quantizer.acoustic_residual_vector_quantizer.layers.3.codebook.cluster_usage",
    ],
)
def test_what_may_be_left_over(name: str) -> None:
    assert is_not_needed(name)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.model.0.conv.conv.weight",
        "model.decoder.weight",
        "depformer.layers.0.norm1.alpha",
        "transformer.layers.48.norm1.alpha",
        "quantizer.rvq_first.input_proj.weight",
        "extra_heads.0.weight",
    ],
)
def test_what_may_not(name: str) -> None:
    assert not is_not_needed(name)
