"""Checkpoints of random weights at tiny size, in both published formats, and audio to feed them.

Written with safetensors, sentencepiece and tokenizers alone, from the layouts and not from `models/`: that our loader,
moshi and transformers read them alike is a finding of the tests, not a consequence of shared code.

Windows are short (16 frames, 20 latents), so that sixty frames turn every ring several times.
"""

import io
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers.models import Unigram
from torch import Tensor

FRAME_SAMPLES = 1920

DIM, NUM_LAYERS, NUM_HEADS, CONTEXT = 64, 2, 4, 16
HIDDEN_SCALE, MLP_DIM = 4.125, 176  # two thirds of 4.125 * 64, as in the released models
TEXT_CARD, AUDIO_CARD, NUM_CODEBOOKS = 64, 64, 8
THETA = 100000.0

MIMI_DIM, MIMI_LAYERS, MIMI_HEADS, MIMI_CONTEXT, MIMI_MLP_DIM = 32, 2, 4, 20, 64
NUM_FILTERS, STRIDES, CODE_DIM = 4, (4, 5, 6, 8), 16

PADDING_ID, WORD_START_ID = 3, 0
PREFIX_SECONDS, DELAY_SECONDS = 0.0, 0.5

Tensors = dict[str, Tensor]


def clip(seed: int, num_samples: int) -> NDArray[np.float32]:
    """Noise whose loudness wanders, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    loudness = 0.25 + 0.2 * np.sin(np.arange(num_samples) / (3000 + 500 * (seed % 7)))
    return np.clip(rng.standard_normal(num_samples) * loudness, -1, 1).astype(np.float32)


def decoder_tensors(seed: int, *, num_extra_heads: int = 0, gloomy: bool = False) -> Tensors:
    """The decoder under its original names.

    Spreads are chosen so that tokens vary from frame to frame. A `gloomy` one shifts all its logits down until their
    maximum is negative about half of the time.
    """
    rng = torch.Generator().manual_seed(seed)
    normal = _normal(rng)
    tensors = {
        "text_emb.weight": normal(TEXT_CARD + 1, DIM),
        "out_norm.alpha": 1 + normal(1, 1, DIM, spread=0.3),
        "text_linear.weight": normal(TEXT_CARD, DIM, spread=4 / math.sqrt(DIM)),
    }
    for codebook in range(NUM_CODEBOOKS):
        tensors[f"emb.{codebook}.weight"] = normal(AUDIO_CARD + 1, DIM)
    for layer in range(NUM_LAYERS):
        root = f"transformer.layers.{layer}."
        tensors |= {
            root + "norm1.alpha": 1 + normal(1, 1, DIM, spread=0.3),
            root + "norm2.alpha": 1 + normal(1, 1, DIM, spread=0.3),
            root + "self_attn.in_proj_weight": normal(3 * DIM, DIM, spread=1.2 / math.sqrt(DIM)),
            root + "self_attn.out_proj.weight": normal(DIM, DIM, spread=1.2 / math.sqrt(DIM)),
            root + "gating.linear_in.weight": normal(2 * MLP_DIM, DIM, spread=1.2 / math.sqrt(DIM)),
            root + "gating.linear_out.weight": normal(DIM, MLP_DIM, spread=1.2 / math.sqrt(MLP_DIM)),
        }
    for head in range(num_extra_heads):
        tensors[f"extra_heads.{head}.weight"] = normal(6, DIM, spread=2 / math.sqrt(DIM))
    if gloomy:
        # Channel 0 of every input is large and positive, and every logit counts it negatively.
        tensors["text_emb.weight"][:, 0] += 12
        tensors["out_norm.alpha"][..., 0] = 1
        tensors["text_linear.weight"][:, 0] -= 2.5
    return tensors


def mimi_tensors(seed: int) -> Tensors:
    """The encoding half of Mimi and its quantizer under their original names."""
    normal = _normal(torch.Generator().manual_seed(1000 + seed))
    rng = torch.Generator().manual_seed(2000 + seed)
    tensors: Tensors = {}

    def conv(name: str, out_channels: int, in_channels: int, kernel: int) -> None:
        spread = 1.4 / math.sqrt(in_channels * kernel)
        tensors[f"encoder.model.{name}.conv.conv.weight"] = normal(out_channels, in_channels, kernel, spread=spread)
        tensors[f"encoder.model.{name}.conv.conv.bias"] = normal(out_channels, spread=0.1)

    channels = NUM_FILTERS
    conv("0", channels, 1, 7)
    for index, stride in enumerate(STRIDES):
        conv(f"{3 * index + 1}.block.1", channels // 2, channels, 3)
        conv(f"{3 * index + 1}.block.3", channels, channels // 2, 1)
        conv(f"{3 * index + 3}", 2 * channels, channels, 2 * stride)
        channels *= 2
    conv("14", MIMI_DIM, channels, 3)
    for layer in range(MIMI_LAYERS):
        root = f"encoder_transformer.transformer.layers.{layer}."
        spread = 1.2 / math.sqrt(MIMI_DIM)
        tensors |= {
            root + "self_attn.in_proj_weight": normal(3 * MIMI_DIM, MIMI_DIM, spread=spread),
            root + "self_attn.out_proj.weight": normal(MIMI_DIM, MIMI_DIM, spread=spread),
            root + "linear1.weight": normal(MIMI_MLP_DIM, MIMI_DIM, spread=spread),
            root + "linear2.weight": normal(MIMI_DIM, MIMI_MLP_DIM, spread=1.2 / math.sqrt(MIMI_MLP_DIM)),
            root + "layer_scale_1.scale": torch.rand(MIMI_DIM, generator=rng),
            root + "layer_scale_2.scale": torch.rand(MIMI_DIM, generator=rng),
        }
        for norm in ("norm1", "norm2"):
            tensors[f"{root}{norm}.weight"] = 1 + normal(MIMI_DIM, spread=0.3)
            tensors[f"{root}{norm}.bias"] = normal(MIMI_DIM, spread=0.1)
    spread = 1.4 / math.sqrt(4 * MIMI_DIM)
    tensors["downsample.conv.conv.conv.weight"] = normal(MIMI_DIM, MIMI_DIM, 4, spread=spread)
    for half, count in (("rvq_first", 1), ("rvq_rest", NUM_CODEBOOKS - 1)):
        root = f"quantizer.{half}."
        tensors[root + "input_proj.weight"] = normal(CODE_DIM, MIMI_DIM, 1, spread=1.2 / math.sqrt(MIMI_DIM))
        tensors[root + "output_proj.weight"] = normal(MIMI_DIM, CODE_DIM, 1, spread=1.2 / math.sqrt(CODE_DIM))
        for index in range(count):
            book = f"{root}vq.layers.{index}._codebook."
            usage = torch.rand(AUDIO_CARD, generator=rng) * 2 + 0.1
            tensors[book + "cluster_usage"] = usage
            # Vectors shrink from codebook to codebook, as the residuals that they have to hit do.
            tensors[book + "embedding_sum"] = normal(AUDIO_CARD, CODE_DIM, spread=8 * 0.8**index) * usage[:, None]
            tensors[book + "_initialized"] = torch.ones(1)
    return tensors


def write_original(folder: Path, seed: int = 0, *, num_extra_heads: int = 0, gloomy: bool = False) -> Path:
    """A checkpoint as Kyutai publishes it: one file for the decoder, one for Mimi, a sentencepiece model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(decoder_tensors(seed, num_extra_heads=num_extra_heads, gloomy=gloomy), folder / "model.safetensors")
    save_file(mimi_tensors(seed), folder / "mimi.safetensors")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(TEXT_CARD))
    extra = {"extra_heads_num_heads": num_extra_heads, "extra_heads_dim": 6} if num_extra_heads else {}
    _write_json(folder / "config.json", original_config() | extra)
    _write_json(folder / "mimi_config.json", original_mimi_config())
    return folder


def write_trfs(folder: Path, seed: int = 0, *, shards: int = 1, bos_row: int = TEXT_CARD, gloomy: bool = False) -> Path:
    """The same weights as the transformers conversion lays them out; `bos_row` is what its files call bos_token_id."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _trfs_decoder(decoder_tensors(seed, gloomy=gloomy)) | _trfs_mimi(mimi_tensors(seed))
    _write_shards(folder, tensors, shards)
    _write_json(folder / "config.json", trfs_config(bos_row=bos_row))
    _write_json(
        folder / "generation_config.json",
        {
            # Without the first line transformers ignores the others (dossier, pitfall i).
            "_from_model_config": False,
            "audio_window_size": 1,
            "bos_token_id": bos_row,
            "cache_implementation": "sliding_window",
            "codec_cache_implementation": "sliding_window",
            "codec_use_cache": True,
            "pad_token_id": PADDING_ID,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "audio_delay_seconds": DELAY_SECONDS,
            "audio_silence_prefix_seconds": PREFIX_SECONDS,
            "feature_size": 1,
            "sampling_rate": 24000,
        },
    )
    write_json_tokenizer(folder / "tokenizer.json", sentencepiece_model(TEXT_CARD))
    return folder


def original_config() -> dict[str, Any]:
    """An LM `config.json` of the original format."""
    return {
        "card": AUDIO_CARD,
        "causal": True,
        "conditioners": {},
        "context": CONTEXT,
        "cross_attention": False,
        "delays": [0] * (NUM_CODEBOOKS + 1),
        "dep_q": 0,
        # A depformer of no codebooks: released configs describe one all the same, and moshi wants to hear that it is
        # `multi_linear`, or it expects a tensor of it.
        "depformer_dim": 32,
        "depformer_multi_linear": True,
        "dim": DIM,
        "existing_text_padding_id": PADDING_ID,
        "gating": "silu",
        "hidden_scale": HIDDEN_SCALE,
        "layer_scale": None,
        "lm_gen_config": {"temp": 0.0, "temp_text": 0.0, "top_k": 250, "top_k_text": 50},
        "max_period": THETA,
        "mimi_config_name": "mimi_config.json",
        "mimi_name": "mimi.safetensors",
        "model_type": "stt",
        "n_q": NUM_CODEBOOKS,
        "norm": "rms_norm_f32",
        "num_heads": NUM_HEADS,
        "num_layers": NUM_LAYERS,
        "positional_embedding": "rope",
        "stt_config": {"audio_delay_seconds": DELAY_SECONDS, "audio_silence_prefix_seconds": PREFIX_SECONDS},
        "text_card": TEXT_CARD,
        "tokenizer_name": "tokenizer.model",
    }


def original_mimi_config() -> dict[str, Any]:
    """A Mimi config of the original format."""
    return {
        "channels": 1,
        "frame_rate": 12.5,
        "sample_rate": 24000,
        "quantizer": {
            "bins": AUDIO_CARD,
            "dimension": CODE_DIM,
            "input_dimension": MIMI_DIM,
            "n_q": NUM_CODEBOOKS,
            "output_dimension": MIMI_DIM,
        },
        "seanet": {
            "activation": "ELU",
            "causal": True,
            "channels": 1,
            "compress": 2,
            "dilation_base": 2,
            "dimension": MIMI_DIM,
            "disable_norm_outer_blocks": 0,
            "kernel_size": 7,
            "last_kernel_size": 3,
            "n_filters": NUM_FILTERS,
            "n_residual_layers": 1,
            "norm": "none",
            "pad_mode": "constant",
            "ratios": list(reversed(STRIDES)),
            "residual_kernel_size": 3,
            "true_skip": True,
        },
        "transformer": {
            "causal": True,
            "context": MIMI_CONTEXT,
            "conv_layout": True,
            "d_model": MIMI_DIM,
            "dim_feedforward": MIMI_MLP_DIM,
            "gating": "none",
            "input_dimension": MIMI_DIM,
            "layer_scale": 0.01,
            "max_period": 10000,
            "norm": "layer_norm",
            "num_heads": MIMI_HEADS,
            "num_layers": MIMI_LAYERS,
            "output_dimensions": [MIMI_DIM],
            "positional_embedding": "rope",
        },
    }


def trfs_config(*, bos_row: int = TEXT_CARD) -> dict[str, Any]:
    """A `config.json` of the -trfs format, spelt as transformers 4 spelt it."""
    return {
        "architectures": ["KyutaiSpeechToTextForConditionalGeneration"],
        "model_type": "kyutai_speech_to_text",
        "audio_bos_token_id": AUDIO_CARD,
        "audio_pad_token_id": TEXT_CARD + 1 + NUM_CODEBOOKS * (AUDIO_CARD + 1),
        "bos_token_id": bos_row,
        "codebook_vocab_size": AUDIO_CARD + 1,
        "ffn_dim": 2 * MLP_DIM,
        "head_dim": DIM // NUM_HEADS,
        "hidden_act": "silu",
        "hidden_size": DIM,
        "max_position_embeddings": 750,
        "num_attention_heads": NUM_HEADS,
        "num_codebooks": NUM_CODEBOOKS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_HEADS,
        "pad_token_id": PADDING_ID,
        "rms_norm_eps": 1e-8,
        "rope_theta": THETA,
        "sliding_window": CONTEXT,
        "tie_word_embeddings": False,
        "vocab_size": TEXT_CARD + 1,
        "codec_config": {
            "model_type": "mimi",
            "audio_channels": 1,
            "codebook_dim": CODE_DIM,
            "codebook_size": AUDIO_CARD,
            "compress": 2,
            "decoder_config": None,  # encoding half only
            "head_dim": MIMI_DIM // MIMI_HEADS,
            "hidden_act": "gelu",
            "hidden_size": MIMI_DIM,
            "intermediate_size": MIMI_MLP_DIM,
            "kernel_size": 7,
            "last_kernel_size": 3,
            "norm_eps": 1e-5,
            "num_attention_heads": MIMI_HEADS,
            "num_filters": NUM_FILTERS,
            "num_hidden_layers": MIMI_LAYERS,
            "num_key_value_heads": MIMI_HEADS,
            "num_quantizers": NUM_CODEBOOKS,
            "num_residual_layers": 1,
            "num_semantic_quantizers": 1,
            "pad_mode": "constant",
            "residual_kernel_size": 3,
            "rope_theta": 10000.0,
            "sampling_rate": 24000,
            "sliding_window": MIMI_CONTEXT,
            "upsample_groups": MIMI_DIM,
            "upsampling_ratios": list(reversed(STRIDES)),
            "use_causal_conv": True,
            "use_conv_shortcut": False,
            "vector_quantization_hidden_dimension": CODE_DIM,
        },
    }


@cache
def sentencepiece_model(num_pieces: int, *, byte_fallback: bool = False) -> bytes:
    """A unigram model of exactly so many pieces: 0 unknown, 1 BOS, 2 EOS, 3 padding, as Kyutai's."""
    text = (
        "the quick brown fox jumps over a lazy dog while seven wizards box five jackals and mix pink quartz very slowly"
    )
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([text, *text.split(), text[::-1]] * 3),
        model_writer=written,
        model_type="unigram",
        vocab_size=num_pieces,
        byte_fallback=byte_fallback,
        pad_id=PADDING_ID,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def write_json_tokenizer(path: Path, model: bytes) -> None:
    """The same pieces as a `tokenizer.json`, put together as transformers' converter for Moshi does."""
    pieces = SentencePieceProcessor(model_proto=model)
    ids = range(pieces.get_piece_size())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in ids]
    tokenizer = JsonTokenizer(Unigram(vocab, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    marks = [pieces.id_to_piece(i) for i in ids if pieces.is_control(i) or pieces.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.save(str(path))


def _normal(rng: torch.Generator) -> Any:
    def draw(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng) * spread

    return draw


def _trfs_decoder(original: Tensors) -> Tensors:
    books = [original[f"emb.{codebook}.weight"] for codebook in range(NUM_CODEBOOKS)]
    nothing = torch.zeros(1, DIM)
    tensors = {
        "model.embed_tokens.embed_tokens.weight": torch.cat([original["text_emb.weight"], *books, nothing]),
        "model.norm.weight": original["out_norm.alpha"].flatten(),
        "lm_head.weight": torch.cat([original["text_linear.weight"], nothing]),
    }
    names = {
        "norm1.alpha": "input_layernorm.weight",
        "norm2.alpha": "post_attention_layernorm.weight",
        "self_attn.out_proj.weight": "self_attn.o_proj.linear.weight",
        "gating.linear_in.weight": "mlp.fc1.weight",
        "gating.linear_out.weight": "mlp.fc2.weight",
    }
    for layer in range(NUM_LAYERS):
        theirs, ours = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        for name, renamed in names.items():
            tensors[theirs + renamed] = original[ours + name].squeeze().clone()
        parts = _split_qkv(original[ours + "self_attn.in_proj_weight"], NUM_HEADS)
        tensors |= {f"{theirs}self_attn.{part}_proj.linear.weight": weight for part, weight in parts.items()}
    return tensors


def _trfs_mimi(original: Tensors) -> Tensors:
    """Original names -> transformers' names, by one pass of replacements; q, k and v apart."""
    renamed = (
        ("encoder.model.", "encoder.layers."),
        ("encoder_transformer.transformer.", "encoder_transformer."),
        ("downsample.conv.conv.conv.", "downsample.conv."),
        (".conv.conv.", ".conv."),
        ("rvq_first", "semantic_residual_vector_quantizer"),
        ("rvq_rest", "acoustic_residual_vector_quantizer"),
        (".vq.layers.", ".layers."),
        ("._codebook.embedding_sum", ".codebook.embed_sum"),
        ("._codebook._initialized", ".codebook.initialized"),
        ("._codebook.", ".codebook."),
        ("layer_scale_1", "self_attn_layer_scale"),
        ("layer_scale_2", "mlp_layer_scale"),
        ("norm1", "input_layernorm"),
        ("norm2", "post_attention_layernorm"),
        ("linear1", "mlp.fc1"),
        ("linear2", "mlp.fc2"),
        ("self_attn.out_proj", "self_attn.o_proj"),
    )
    tensors: Tensors = {}
    for name, tensor in original.items():
        for old, new in renamed:
            name = name.replace(old, new)
        if name.endswith("in_proj_weight"):
            stem = "codec_model." + name.removesuffix("in_proj_weight")
            parts = _split_qkv(tensor, MIMI_HEADS)
            tensors |= {f"{stem}{part}_proj.weight": weight for part, weight in parts.items()}
        else:
            tensors["codec_model." + name] = tensor
    return tensors


def _split_qkv(weight: Tensor, num_heads: int) -> Tensors:
    """q, k and v, with the even rows of every q and k head moved before its odd rows."""
    q, k, v = weight.chunk(3)
    head_dim = q.shape[0] // num_heads
    order = [head * head_dim + row for head in range(num_heads) for odd in (0, 1) for row in range(odd, head_dim, 2)]
    return {"q": q[order].clone(), "k": k[order].clone(), "v": v.clone()}


def _write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    where = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        mine = {name: tensors[name] for name in names if where[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
