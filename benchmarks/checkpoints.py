"""Random weights of a named shape on disk, the same in both published formats, for the peers to load."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.config import RELEASED_MIMI
from models.names import Rule, decoder_rules_original, mimi_rules_original
from models.shapes import Shape

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Where the two folders are, and what moshi's loaders want to be told."""

    original: Path
    trfs: Path
    lm_kwargs: dict[str, Any]
    mimi_config: dict[str, Any]


def write_both(folder: Path, shape: Shape, *, padding_weight: float = 0.0, seed: int = 0) -> Written:
    """Write both formats below `folder`.

    Args:
        padding_weight: the larger, the more of the tokens are padding, as most are in speech.
    """
    original, trfs = folder / "original", folder / "trfs"
    decoder = _random(decoder_rules_original(shape.decoder), seed)
    mimi = _random(mimi_rules_original(shape.mimi), seed + 1)
    _favour_padding(decoder, shape, padding_weight)
    for target in (original, trfs):
        target.mkdir(parents=True, exist_ok=True)
    save_file(decoder, original / "model.safetensors")
    save_file(mimi, original / "mimi.safetensors")
    save_file(
        _as_trfs_decoder(decoder, shape) | _as_trfs_mimi(mimi, shape), trfs / "model.safetensors", {"format": "pt"}
    )
    _write_json(trfs / "config.json", _trfs_config(shape))
    _write_json(trfs / "generation_config.json", _generation_config(shape))
    speech = shape.speech
    preprocessor = {"audio_delay_seconds": speech.delay_seconds, "audio_silence_prefix_seconds": speech.prefix_seconds}
    _write_json(trfs / "preprocessor_config.json", preprocessor)
    _write_json(trfs / "tokenizer.json", {})  # has to be there, and is not read
    return Written(original=original, trfs=trfs, lm_kwargs=_lm_kwargs(shape), mimi_config=_mimi_config(shape))


def _random(rules: Sequence[Rule], seed: int) -> Tensors:
    """Every stored tensor of the original format, spread so that tokens and codes vary from frame to frame."""
    rng = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for rule in rules:
        for name, shape in rule.sources:
            tensors[name] = _values(name, shape, rng)
    # Sums are stored as what they are: centroids times how often each was used.
    for name in [name for name in tensors if name.endswith("embedding_sum")]:
        root = name.removesuffix("embedding_sum")
        index = int(root.split(".")[-3])
        tensors[name] *= 8 * 0.8**index * tensors[root + "cluster_usage"][:, None]
        tensors[root + "_initialized"] = torch.ones(1)
    for name in [name for name in tensors if name.endswith("input_proj.weight")]:
        outward = tensors[name].transpose(0, 1).contiguous()  # the decoding half's, which the peers want to find
        tensors[name.replace("input_proj", "output_proj")] = outward
    return tensors


def _values(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=rng)
    if "alpha" in name or (".norm" in name and name.endswith("weight")):
        return 1 + 0.3 * normal
    if name.endswith(("bias", "scale")):
        return 0.1 * normal if name.endswith("bias") else torch.rand(shape, generator=rng)
    if name.endswith("cluster_usage"):
        return torch.rand(shape, generator=rng) * 2 + 0.1
    if name.startswith(("emb.", "text_emb")) or name.endswith("embedding_sum"):
        return normal
    spread = 4.0 if name == "text_linear.weight" else 1.2
    return normal * spread / math.sqrt(normal[0].numel())


def _favour_padding(decoder: Tensors, shape: Shape, weight: float) -> None:
    """Channel 0 of every text input is large, and of all logits only that of padding counts it."""
    decoder["text_emb.weight"][:, 0] += 40
    decoder["out_norm.alpha"][..., 0] = 1
    decoder["text_linear.weight"][:, 0] = 0
    decoder["text_linear.weight"][shape.speech.padding_id, 0] = weight


def _as_trfs_decoder(original: Tensors, shape: Shape) -> Tensors:
    config = shape.decoder
    books = [original[f"emb.{codebook}.weight"] for codebook in range(config.num_codebooks)]
    nothing = torch.zeros(1, config.dim)
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
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        for name, renamed in names.items():
            tensors[theirs + renamed] = original[ours + name].squeeze().clone()
        parts = _split_qkv(original[ours + "self_attn.in_proj_weight"], config.num_heads)
        tensors |= {f"{theirs}self_attn.{part}_proj.linear.weight": weight for part, weight in parts.items()}
    return tensors


_MIMI_NAMES = (
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


def _as_trfs_mimi(original: Tensors, shape: Shape) -> Tensors:
    tensors: Tensors = {}
    for name, tensor in original.items():
        for old, new in _MIMI_NAMES:
            name = name.replace(old, new)
        if name.endswith("in_proj_weight"):
            stem = "codec_model." + name.removesuffix("in_proj_weight")
            parts = _split_qkv(tensor, shape.mimi.num_heads)
            tensors |= {f"{stem}{part}_proj.weight": weight for part, weight in parts.items()}
        else:
            tensors["codec_model." + name] = tensor
    return tensors


def _split_qkv(weight: Tensor, num_heads: int) -> Tensors:
    """q, k and v; the even rows of every q and k head before its odd rows, as the conversion script has them."""
    q, k, v = weight.chunk(3)
    order = torch.arange(q.shape[0]).view(num_heads, -1, 2).transpose(1, 2).flatten()
    return {"q": q[order].clone(), "k": k[order].clone(), "v": v.clone()}


def _lm_kwargs(shape: Shape) -> dict[str, Any]:
    """What moshi's `get_moshi_lm` takes: a released `config.json` less the keys that its loader pops."""
    config = shape.decoder
    return {
        "card": config.audio_card,
        "causal": True,
        "conditioners": {},
        "context": config.context,
        "cross_attention": False,
        "delays": [0] * (config.num_codebooks + 1),
        "dep_q": 0,
        "depformer_dim": 32,
        "depformer_multi_linear": True,
        "dim": config.dim,
        "existing_text_padding_id": shape.speech.padding_id,
        "gating": "silu",
        "hidden_scale": 1.5 * config.mlp_dim / config.dim,
        "layer_scale": None,
        "max_period": config.rope_theta,
        "n_q": config.num_codebooks,
        "norm": "rms_norm_f32",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "positional_embedding": "rope",
        "text_card": config.text_card,
    }


def _mimi_config(shape: Shape) -> dict[str, Any]:
    """What moshi's `get_mimi` takes."""
    mimi, released = shape.mimi, RELEASED_MIMI
    return {
        "channels": 1,
        "frame_rate": mimi.frame_rate_hz,
        "sample_rate": mimi.sample_rate_hz,
        "quantizer": {
            "bins": mimi.codebook_size,
            "dimension": mimi.codebook_dim,
            "input_dimension": mimi.dim,
            "n_q": mimi.num_codebooks,
            "output_dimension": mimi.dim,
        },
        "seanet": released["seanet"]
        | {
            "activation": "ELU",
            "causal": True,
            "dilation_base": 2,
            "dimension": mimi.dim,
            "disable_norm_outer_blocks": 0,
            "n_filters": mimi.num_filters,
            "norm": "none",
            "pad_mode": "constant",
            "compress": mimi.compress,
            "true_skip": True,
        },
        "transformer": {
            "causal": True,
            "context": mimi.context,
            "conv_layout": True,
            "d_model": mimi.dim,
            "dim_feedforward": mimi.mlp_dim,
            "gating": "none",
            "input_dimension": mimi.dim,
            "layer_scale": 0.01,
            "max_period": int(mimi.rope_theta),
            "norm": "layer_norm",
            "num_heads": mimi.num_heads,
            "num_layers": mimi.num_layers,
            "output_dimensions": [mimi.dim],
            "positional_embedding": "rope",
        },
    }


def _trfs_config(shape: Shape) -> dict[str, Any]:
    config, mimi = shape.decoder, shape.mimi
    return {
        "architectures": ["KyutaiSpeechToTextForConditionalGeneration"],
        "model_type": "kyutai_speech_to_text",
        "audio_bos_token_id": config.audio_card,
        "audio_pad_token_id": config.text_card + 1 + config.num_codebooks * (config.audio_card + 1),
        "bos_token_id": config.text_card,
        "codebook_vocab_size": config.audio_card + 1,
        "ffn_dim": 2 * config.mlp_dim,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "max_position_embeddings": 750,
        "num_attention_heads": config.num_heads,
        "num_codebooks": config.num_codebooks,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_heads,
        "pad_token_id": shape.speech.padding_id,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.context,
        "tie_word_embeddings": False,
        "vocab_size": config.text_card + 1,
        "codec_config": {
            "model_type": "mimi",
            "audio_channels": 1,
            "codebook_dim": mimi.codebook_dim,
            "codebook_size": mimi.codebook_size,
            "compress": mimi.compress,
            "decoder_config": None,
            "head_dim": mimi.dim // mimi.num_heads,
            "hidden_act": "gelu",
            "hidden_size": mimi.dim,
            "intermediate_size": mimi.mlp_dim,
            "kernel_size": mimi.kernel_size,
            "last_kernel_size": mimi.last_kernel_size,
            "norm_eps": mimi.norm_eps,
            "num_attention_heads": mimi.num_heads,
            "num_filters": mimi.num_filters,
            "num_hidden_layers": mimi.num_layers,
            "num_key_value_heads": mimi.num_heads,
            "num_quantizers": mimi.num_codebooks,
            "num_residual_layers": 1,
            "num_semantic_quantizers": mimi.num_semantic,
            "pad_mode": "constant",
            "residual_kernel_size": mimi.residual_kernel_size,
            "rope_theta": mimi.rope_theta,
            "sampling_rate": mimi.sample_rate_hz,
            "sliding_window": mimi.context,
            "upsample_groups": mimi.dim,
            "upsampling_ratios": list(reversed(mimi.strides)),
            "use_causal_conv": True,
            "use_conv_shortcut": False,
            "vector_quantization_hidden_dimension": mimi.codebook_dim,
        },
    }


def _generation_config(shape: Shape) -> dict[str, Any]:
    """As released, but with no `audio_window_size`: Mimi then encodes in one shot, which is faster."""
    return {
        "_from_model_config": False,
        "bos_token_id": shape.decoder.text_card,
        "codec_use_cache": True,
        "pad_token_id": shape.speech.padding_id,
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
