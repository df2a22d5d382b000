"""Which stored tensors make each of our parameters, in both formats: the one place that knows foreign names.

Rotary layout: moshi turns neighbouring channels (2i, 2i + 1), transformers the halves (i, i + E/2). We turn halves, so
rows of q and k of the original format are permuted here, as transformers' conversion script does.
"""

# D channels, K codebooks, H heads.

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import DecoderConfig, MimiConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one parameter of ours is made."""

    target: str  # name in our module
    sources: tuple[tuple[str, Shape], ...]  # stored names with the shapes they must have
    build: Callable[[list[Tensor]], Tensor]


def decoder_rules_original(config: DecoderConfig) -> list[Rule]:
    """Rules for an LM file of the original format."""
    dim, hidden = config.dim, config.mlp_dim
    audio = tuple((f"emb.{k}.weight", (config.audio_card + 1, dim)) for k in range(config.num_codebooks))
    rules = [
        _same("text_embedding.weight", "text_emb.weight", (config.text_card + 1, dim)),
        Rule(target="audio_embedding.weight", sources=audio, build=torch.cat),
        _flat("norm.weight", "out_norm.alpha", (1, 1, dim)),
        _same("text_head.weight", "text_linear.weight", (config.text_card, dim)),
    ]
    for head in range(config.num_extra_heads):
        name = f"extra_heads.{head}.weight"
        rules.append(_same(name, name, (config.extra_head_dim, dim)))
    for layer in range(config.num_layers):
        ours, theirs = f"transformer.layers.{layer}.", f"transformer.layers.{layer}."
        rules += [
            _flat(ours + "norm1.weight", theirs + "norm1.alpha", (1, 1, dim)),
            _interleaved_qkv(ours, theirs, dim, config.num_heads),
            _same(ours + "attention.out.weight", theirs + "self_attn.out_proj.weight", (dim, dim)),
            _flat(ours + "norm2.weight", theirs + "norm2.alpha", (1, 1, dim)),
            _same(ours + "mlp.up.weight", theirs + "gating.linear_in.weight", (2 * hidden, dim)),
            _same(ours + "mlp.down.weight", theirs + "gating.linear_out.weight", (dim, hidden)),
        ]
    return rules


def decoder_rules_trfs(config: DecoderConfig) -> list[Rule]:
    """Rules for the LM half of a -trfs checkpoint."""
    dim, hidden, num_text = config.dim, config.mlp_dim, config.text_card + 1
    num_rows = num_text + config.num_codebooks * (config.audio_card + 1)
    # One table `[text | codebook 0 | codebook 1 | ...]` and, at its end, a padding row that speech to text never reads.
    table = (("model.embed_tokens.embed_tokens.weight", (num_rows + 1, dim)),)
    rules = [
        Rule(target="text_embedding.weight", sources=table, build=lambda t: t[0][:num_text]),
        Rule(target="audio_embedding.weight", sources=table, build=lambda t: t[0][num_text:num_rows]),
        _same("norm.weight", "model.norm.weight", (dim,)),
        # The last row is zero: transformers wants a logit for the BOS id too. See `slots.py`.
        Rule(
            target="text_head.weight",
            sources=(("lm_head.weight", (num_text, dim)),),
            build=lambda t: t[0][: num_text - 1],
        ),
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        rules += [
            _same(ours + "norm1.weight", theirs + "input_layernorm.weight", (dim,)),
            _separate_qkv(ours, theirs, dim, suffix=".linear.weight"),
            _same(ours + "attention.out.weight", theirs + "self_attn.o_proj.linear.weight", (dim, dim)),
            _same(ours + "norm2.weight", theirs + "post_attention_layernorm.weight", (dim,)),
            _same(ours + "mlp.up.weight", theirs + "mlp.fc1.weight", (2 * hidden, dim)),
            _same(ours + "mlp.down.weight", theirs + "mlp.fc2.weight", (dim, hidden)),
        ]
    return rules


def mimi_rules_original(config: MimiConfig) -> list[Rule]:
    """Rules for a Mimi file of the original format."""
    rules = _seanet_rules(config, lambda path: f"encoder.model.{path}.conv.conv.")
    dim, mlp = config.dim, config.mlp_dim
    for layer in range(config.num_layers):
        ours, theirs = f"transformer.layers.{layer}.", f"encoder_transformer.transformer.layers.{layer}."
        rules += [
            _interleaved_qkv(ours, theirs, dim, config.num_heads),
            _same(ours + "attention.out.weight", theirs + "self_attn.out_proj.weight", (dim, dim)),
            _same(ours + "mlp.up.weight", theirs + "linear1.weight", (mlp, dim)),
            _same(ours + "mlp.down.weight", theirs + "linear2.weight", (dim, mlp)),
            _same(ours + "scale1.weight", theirs + "layer_scale_1.scale", (dim,)),
            _same(ours + "scale2.weight", theirs + "layer_scale_2.scale", (dim,)),
        ]
        for norm in ("norm1", "norm2"):
            rules += [_same(f"{ours}{norm}.{p}", f"{theirs}{norm}.{p}", (dim,)) for p in ("weight", "bias")]
    kernel = 2 * config.downsample_stride
    rules.append(_same("downsample.weight", "downsample.conv.conv.conv.weight", (dim, dim, kernel)))
    rules += _quantizer_rules(
        config,
        semantic="quantizer.rvq_first.",
        acoustic="quantizer.rvq_rest.",
        codebook=lambda i: f"vq.layers.{i}._codebook.",
        total="embedding_sum",
    )
    return rules


def mimi_rules_trfs(config: MimiConfig) -> list[Rule]:
    """Rules for the codec half of a -trfs checkpoint."""
    root = "codec_model."
    rules = _seanet_rules(config, lambda path: f"{root}encoder.layers.{path}.conv.")
    dim, mlp = config.dim, config.mlp_dim
    norms = (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"))
    for layer in range(config.num_layers):
        ours, theirs = f"transformer.layers.{layer}.", f"{root}encoder_transformer.layers.{layer}."
        rules += [
            _separate_qkv(ours, theirs, dim, suffix=".weight"),
            _same(ours + "attention.out.weight", theirs + "self_attn.o_proj.weight", (dim, dim)),
            _same(ours + "mlp.up.weight", theirs + "mlp.fc1.weight", (mlp, dim)),
            _same(ours + "mlp.down.weight", theirs + "mlp.fc2.weight", (dim, mlp)),
            _same(ours + "scale1.weight", theirs + "self_attn_layer_scale.scale", (dim,)),
            _same(ours + "scale2.weight", theirs + "mlp_layer_scale.scale", (dim,)),
        ]
        for mine, name in norms:
            rules += [_same(f"{ours}{mine}.{p}", f"{theirs}{name}.{p}", (dim,)) for p in ("weight", "bias")]
    kernel = 2 * config.downsample_stride
    rules.append(_same("downsample.weight", f"{root}downsample.conv.weight", (dim, dim, kernel)))
    rules += _quantizer_rules(
        config,
        semantic=f"{root}quantizer.semantic_residual_vector_quantizer.",
        acoustic=f"{root}quantizer.acoustic_residual_vector_quantizer.",
        codebook=lambda i: f"layers.{i}.codebook.",
        total="embed_sum",
    )
    return rules


# Stored, and rightly not read: the codec's decoding half, codebooks beyond those the decoder reads, k-means leftovers.
_NOT_NEEDED = re.compile(
    r"""(codec_model\.)?(
        (decoder|decoder_transformer|upsample)\. |
        quantizer\..*\.output_proj\.weight$ |
        quantizer\..*codebook\.(_?initialized|cluster_usage|embedding_sum|embed_sum)$
    )""",
    re.VERBOSE,
)


def is_not_needed(name: str) -> bool:
    """Whether a stored tensor may be left over without being a sign of a wrong checkpoint."""
    return _NOT_NEEDED.match(name) is not None


def _same(target: str, source: str, shape: Shape) -> Rule:
    return Rule(target=target, sources=((source, shape),), build=lambda tensors: tensors[0])


def _flat(target: str, source: str, shape: Shape) -> Rule:
    return Rule(target=target, sources=((source, shape),), build=lambda tensors: tensors[0].flatten())


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of interleaved rotary pairs -> rows of rotary halves."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _interleaved_qkv(ours: str, theirs: str, dim: int, num_heads: int) -> Rule:
    def build(tensors: list[Tensor]) -> Tensor:
        q, k, v = tensors[0].chunk(3)
        return torch.cat([_halves(q, num_heads), _halves(k, num_heads), v])

    source = (theirs + "self_attn.in_proj_weight", (3 * dim, dim))
    return Rule(target=ours + "attention.qkv.weight", sources=(source,), build=build)


def _separate_qkv(ours: str, theirs: str, dim: int, *, suffix: str) -> Rule:
    sources = tuple((f"{theirs}self_attn.{part}_proj{suffix}", (dim, dim)) for part in "qkv")
    return Rule(target=ours + "attention.qkv.weight", sources=sources, build=torch.cat)


def _seanet_rules(config: MimiConfig, prefix: Callable[[str], str]) -> list[Rule]:
    """SEANet is numbered alike in both formats: 0, then per stride a block and a convolution, then the last."""
    convs: list[tuple[str, str, Shape]] = [("first", "0", (config.num_filters, 1, config.kernel_size))]
    channels = config.num_filters
    for index, stride in enumerate(config.strides):
        ours, block, narrow = f"stages.{index}.", 1 + 3 * index, channels // config.compress
        convs += [
            (ours + "narrow", f"{block}.block.1", (narrow, channels, config.residual_kernel_size)),
            (ours + "widen", f"{block}.block.3", (channels, narrow, 1)),
            (ours + "down", f"{block + 2}", (2 * channels, channels, 2 * stride)),
        ]
        channels *= 2
    convs.append(("last", f"{3 * len(config.strides) + 2}", (config.dim, channels, config.last_kernel_size)))
    rules: list[Rule] = []
    for ours, path, shape in convs:
        rules += [
            _same(f"seanet.{ours}.weight", f"{prefix(path)}weight", shape),
            _same(f"seanet.{ours}.bias", f"{prefix(path)}bias", shape[:1]),
        ]
    return rules


def _quantizer_rules(
    config: MimiConfig, *, semantic: str, acoustic: str, codebook: Callable[[int], str], total: str
) -> list[Rule]:
    rules: list[Rule] = []
    num_semantic = min(config.num_semantic, config.num_codebooks)
    halves = (("semantic", semantic, num_semantic), ("acoustic", acoustic, config.num_codebooks - num_semantic))
    for ours, root, count in halves:
        sources: list[tuple[str, Shape]] = []
        for index in range(count):
            sources += [
                (f"{root}{codebook(index)}{total}", (config.codebook_size, config.codebook_dim)),
                (f"{root}{codebook(index)}cluster_usage", (config.codebook_size,)),
            ]
        rules += [
            Rule(
                target=f"quantizer.{ours}.input_proj.weight",
                sources=((f"{root}input_proj.weight", (config.codebook_dim, config.dim, 1)),),
                build=lambda tensors: tensors[0].squeeze(-1),
            ),
            Rule(target=f"quantizer.{ours}.codebooks_KVQ", sources=tuple(sources), build=_centroids),
        ]
    return rules


def _centroids(tensors: list[Tensor]) -> Tensor:
    """Running sums and counts of each codebook, in turn -> its vectors `[K, V, Q]`."""
    if not tensors:
        return torch.empty(0)
    totals, usages = tensors[0::2], tensors[1::2]
    # 1e-5 is the floor both references use (moshi `core_vq.py`), so that an unused code does not divide by zero.
    vectors = [
        total.float() / usage.float().clamp(min=1e-5)[:, None] for total, usage in zip(totals, usages, strict=True)
    ]
    return torch.stack(vectors)
