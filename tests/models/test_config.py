"""The released configs are read as what they describe; what is not implemented is refused by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.config import (
    RELEASED_MIMI,
    DecoderConfig,
    FormatError,
    MimiConfig,
    SpeechConfig,
    decoder_config_from_original,
    decoder_config_from_trfs,
    mimi_config_from_original,
    mimi_config_from_trfs,
    speech_config_from_original,
    speech_config_from_trfs,
)
from models.decoder import Decoder
from models.mimi import MimiEncoder
from tests.tiny import original_config, original_mimi_config, trfs_config

# What the two released checkpoints have in common, as their config.json say it.
RELEASED = {
    "card": 2048,
    "n_q": 32,
    "dep_q": 0,
    "delays": [0] * 33,
    "dim": 2048,
    "existing_text_padding_id": 3,
    "hidden_scale": 4.125,
    "max_period": 100000.0,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "lm_gen_config": {"temp": 0.0, "temp_text": 0.0, "top_k": 250, "top_k_text": 50},
}
STT_2_6B = RELEASED | {
    "text_card": 4000,
    "num_heads": 32,
    "num_layers": 48,
    "context": 375,
    "stt_config": {"audio_delay_seconds": 2.5, "audio_silence_prefix_seconds": 1.0},
}
STT_1B = RELEASED | {
    "text_card": 8000,
    "num_heads": 16,
    "num_layers": 16,
    "context": 750,
    "stt_config": {"audio_delay_seconds": 0.5, "audio_silence_prefix_seconds": 0.0},
}
STT_2_6B_TRFS = {
    "model_type": "kyutai_speech_to_text",
    "vocab_size": 4001,
    "codebook_vocab_size": 2049,
    "num_codebooks": 32,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "ffn_dim": 11264,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-08,
    "rope_theta": 100000.0,
    "sliding_window": 375,
    "pad_token_id": 3,
    "bos_token_id": 48000,
    "codec_config": {
        "model_type": "mimi",
        "sampling_rate": 24000,
        "audio_channels": 1,
        "hidden_size": 512,
        "num_filters": 64,
        "num_residual_layers": 1,
        "upsampling_ratios": [8, 6, 5, 4],
        "kernel_size": 7,
        "last_kernel_size": 3,
        "residual_kernel_size": 3,
        "use_causal_conv": True,
        "pad_mode": "constant",
        "compress": 2,
        "codebook_size": 2048,
        "codebook_dim": 256,
        "num_quantizers": 32,
        "use_conv_shortcut": False,
        "num_semantic_quantizers": 1,
        "num_hidden_layers": 8,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "hidden_act": "gelu",
        "norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 250,
    },
}


def decoder_size(config: DecoderConfig) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in Decoder(config).parameters())


def test_the_released_2_6b() -> None:
    config = decoder_config_from_original(STT_2_6B)
    assert (config.head_dim, config.mlp_dim, config.context) == (64, 5632, 375)
    assert decoder_size(config) == 2_617_118_720
    speech = SpeechConfig(prefix_seconds=1.0, delay_seconds=2.5, padding_id=3, word_start_id=0, top_k=50)
    assert speech_config_from_original(STT_2_6B) == speech


def test_the_released_1b() -> None:
    config = decoder_config_from_original(STT_1B)
    assert (config.head_dim, config.mlp_dim, config.context) == (128, 5632, 750)
    assert decoder_size(config) == 989_204_480
    speech = SpeechConfig(prefix_seconds=0.0, delay_seconds=0.5, padding_id=3, word_start_id=0, top_k=50)
    assert speech_config_from_original(STT_1B) == speech


def test_the_candle_1b_has_four_heads_more() -> None:
    config = decoder_config_from_original(STT_1B | {"extra_heads_num_heads": 4, "extra_heads_dim": 6})
    assert decoder_size(config) == 989_204_480 + 4 * 6 * 2048


def test_both_formats_describe_the_same_networks() -> None:
    assert decoder_config_from_trfs(STT_2_6B_TRFS) == decoder_config_from_original(STT_2_6B)
    codec = mimi_config_from_trfs(STT_2_6B_TRFS["codec_config"], num_codebooks=32)
    assert codec == mimi_config_from_original(RELEASED_MIMI, num_codebooks=32)


def test_the_released_mimi() -> None:
    config = mimi_config_from_original(RELEASED_MIMI, num_codebooks=32)
    assert (config.latent_samples, config.frame_samples, config.frame_rate_hz) == (960, 1920, 12.5)
    with torch.device("meta"):
        mimi = MimiEncoder(config)
    # The file holds sums and counts of each codebook, we hold the quotient: 32 counts of 2,048 fewer than 55,972,128.
    assert sum(weight.numel() for weight in mimi.parameters()) == 55_972_128 - 32 * 2048


def test_special_ids_of_a_converted_checkpoint() -> None:
    preprocessor = {"audio_delay_seconds": 2.5, "audio_silence_prefix_seconds": 1.0}
    speech = speech_config_from_trfs(STT_2_6B_TRFS, preprocessor, {"bos_token_id": 48000})
    assert speech == replace(speech_config_from_original(STT_2_6B), hf_bos_row=48000, top_k=None)
    assert speech_config_from_trfs(STT_2_6B_TRFS, preprocessor, {}).hf_bos_row == 48000


def test_rope_theta_in_the_spelling_of_transformers_5() -> None:
    config = {key: value for key, value in trfs_config().items() if key != "rope_theta"}
    spelt = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
    assert decoder_config_from_trfs(spelt) == decoder_config_from_trfs(trfs_config())
    with pytest.raises(FormatError, match="no 'rope_theta'"):
        decoder_config_from_trfs(config)


def test_a_head_size_of_null_is_the_usual_one() -> None:
    """transformers writes null for what it derives."""
    assert decoder_config_from_trfs(trfs_config() | {"head_dim": None}) == decoder_config_from_trfs(trfs_config())


def test_fewer_codebooks_than_the_codec_makes() -> None:
    assert mimi_config_from_original(RELEASED_MIMI, num_codebooks=20).num_codebooks == 20
    with pytest.raises(FormatError, match="reads 33 codebooks, but the codec makes only 32"):
        mimi_config_from_original(RELEASED_MIMI, num_codebooks=33)


def test_a_plain_mlp_is_gated_at_21_eighths() -> None:
    """moshi's special case; two thirds of 4 * 64 would be 170."""
    assert decoder_config_from_original(original_config() | {"hidden_scale": 4}).mlp_dim == 168
    assert decoder_config_from_original(original_config()).mlp_dim == 176


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "layer_norm"}, "norm='layer_norm'; this model is built for 'rms_norm_f32'"),
        ({"gating": "none"}, "gating='none'"),
        ({"positional_embedding": "sin"}, "positional_embedding='sin'"),
        ({"dep_q": 8}, "dep_q=8; this model is built for 0"),
        ({"delays": [0, 0, 2]}, r"delays are \[0, 0, 2\]"),
        ({"context": None}, "no 'context'; found card, causal"),
    ],
)
def test_variants_of_the_original_format_that_are_not_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decoder_config_from_original(original_config() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads=2; this model is built for 4"),
        ({"head_dim": 128}, "head_dim=128; this model is built for 16"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": None}, "no 'sliding_window'"),
    ],
)
def test_variants_of_the_trfs_format_that_are_not_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decoder_config_from_trfs(trfs_config() | change)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("seanet", {"channels": 2}),
        ("seanet", {"pad_mode": "reflect"}),
        ("seanet", {"n_residual_layers": 3}),
        ("transformer", {"norm": "rms_norm_f32"}),
        ("transformer", {"gating": "silu"}),
    ],
)
def test_variants_of_mimi_that_are_not_built(section: str, change: dict[str, Any]) -> None:
    config = original_mimi_config()
    config[section] |= change
    with pytest.raises(FormatError, match=next(iter(change))):
        mimi_config_from_original(config, num_codebooks=8)


def test_the_tiny_configs_agree() -> None:
    assert decoder_config_from_original(original_config()) == decoder_config_from_trfs(trfs_config())
    codec: MimiConfig = mimi_config_from_trfs(trfs_config()["codec_config"], num_codebooks=8)
    assert codec == mimi_config_from_original(original_mimi_config(), num_codebooks=8)
