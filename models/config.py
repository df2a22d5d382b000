"""The dims of the two networks and the facts of a checkpoint, read from the checkpoint's own JSON.

Two formats exist. *Original*: Kyutai's own repositories, an LM `config.json` and (rarely) a Mimi config beside it.
*trfs*: the repositories converted for transformers, one `config.json` with the codec nested inside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["original", "trfs"]


class FormatError(Exception):
    """A checkpoint whose files or settings are not those of a model this code implements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MimiConfig:
    """Dims of the Mimi encoder. Source of the defaults' names: moshi `loaders.py`, transformers `MimiConfig`."""

    sample_rate_hz: int
    num_filters: int  # SEANet channels at the input rate; doubled by every stride
    strides: tuple[int, ...]  # in the order the audio meets them, e.g. 4, 5, 6, 8
    kernel_size: int
    residual_kernel_size: int
    last_kernel_size: int
    compress: int  # the residual blocks' bottleneck divides the channels by this
    dim: int  # channels of the latent
    num_layers: int
    num_heads: int
    mlp_dim: int
    context: int  # attention window, in latents
    rope_theta: float
    norm_eps: float
    downsample_stride: int
    codebook_size: int
    codebook_dim: int
    num_codebooks: int  # used by the decoder; the file may hold more
    num_semantic: int

    def __post_init__(self) -> None:
        _require_heads(self.dim, self.num_heads, self.context)

    @property
    def latent_samples(self) -> int:
        """Audio samples per latent (960 in the released codec: 25 Hz)."""
        samples = 1
        for stride in self.strides:
            samples *= stride
        return samples

    @property
    def frame_samples(self) -> int:
        """Audio samples per frame (1,920 in the released codec: 12.5 Hz)."""
        return self.latent_samples * self.downsample_stride

    @property
    def frame_rate_hz(self) -> float:
        """Frames per second of audio."""
        return self.sample_rate_hz / self.frame_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Dims of the delayed-streams decoder."""

    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int  # of the gated product, i.e. half the rows of linear_in
    context: int  # attention window, in frames, the current one included
    rope_theta: float
    norm_eps: float
    num_codebooks: int
    audio_card: int  # codes per codebook; the embedding row of this index is the audio BOS
    text_card: int  # text ids the model can emit; the embedding row of this index is the text BOS
    num_extra_heads: int = 0  # semantic voice-activity heads
    extra_head_dim: int = 0

    def __post_init__(self) -> None:
        _require_heads(self.dim, self.num_heads, self.context)

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechConfig:
    """How audio has to be presented to the decoder, and which of its tokens are not words."""

    prefix_seconds: float  # silence before the audio
    delay_seconds: float  # how late the text follows the audio
    padding_id: int  # "nothing to say in this frame"
    word_start_id: int  # emitted on the frame where the next word begins
    # The row of the shared embedding table that transformers feeds as the text BOS. None in the original format. The
    # released -trfs files say 48000, an *audio* row of the 2.6B's table; only the `first-frame-twice` mode follows it.
    hf_bos_row: int | None = None
    top_k: int | None = None  # for temperature > 0: sample among so many best ids


def decoder_config_from_original(config: Mapping[str, Any]) -> DecoderConfig:
    """Read an LM `config.json` of the original format.

    Raises:
        FormatError: a key is missing, or names a variant (norm, gating, delays) that no STT checkpoint uses.
    """
    _require_values(config, {"norm": "rms_norm_f32", "gating": "silu", "positional_embedding": "rope", "dep_q": 0})
    if any(config.get("delays") or []):
        raise FormatError(f"config.json: delays are {config['delays']}; a speech-to-text model has only zeros")
    dim = int(_get(config, "dim"))
    feed_forward = int(float(_get(config, "hidden_scale")) * dim)
    return DecoderConfig(
        dim=dim,
        num_layers=int(_get(config, "num_layers")),
        num_heads=int(_get(config, "num_heads")),
        # moshi `gating.py`: 21/8 for a plain 4x MLP, else two thirds of dim_feedforward.
        mlp_dim=(21 * dim) // 8 if feed_forward == 4 * dim else (2 * feed_forward) // 3,
        context=int(_get(config, "context")),
        rope_theta=float(_get(config, "max_period")),
        norm_eps=1e-8,  # moshi `create_norm_fn`: fixed for rms_norm_f32
        num_codebooks=int(_get(config, "n_q")),
        audio_card=int(_get(config, "card")),
        text_card=int(_get(config, "text_card")),
        num_extra_heads=int(config.get("extra_heads_num_heads", 0)),
        extra_head_dim=int(config.get("extra_heads_dim", 0)),
    )


def speech_config_from_original(config: Mapping[str, Any]) -> SpeechConfig:
    """Read what an original `config.json` says about padding and special ids."""
    stt = _get(config, "stt_config")
    top_k = (config.get("lm_gen_config") or {}).get("top_k_text")
    return SpeechConfig(
        prefix_seconds=float(stt.get("audio_silence_prefix_seconds", 0.0)),
        delay_seconds=float(_get(stt, "audio_delay_seconds")),
        padding_id=int(config.get("existing_text_padding_id", 3)),
        word_start_id=int(config.get("existing_text_end_padding_id", 0)),
        top_k=int(top_k) if top_k else None,
    )


# What moshi `loaders.py` builds when a repository names no Mimi config, as none of the released ones does.
RELEASED_MIMI: Mapping[str, Any] = {
    "sample_rate": 24000,
    "frame_rate": 12.5,
    "seanet": {
        "channels": 1,
        "dimension": 512,
        "n_filters": 64,
        "n_residual_layers": 1,
        "ratios": [8, 6, 5, 4],
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 3,
        "compress": 2,
    },
    "quantizer": {"dimension": 256, "n_q": 32, "bins": 2048},
    "transformer": {
        "d_model": 512,
        "num_heads": 8,
        "num_layers": 8,
        "context": 250,
        "max_period": 10000,
        "dim_feedforward": 2048,
    },
}


def mimi_config_from_original(config: Mapping[str, Any], *, num_codebooks: int) -> MimiConfig:
    """Read a Mimi config of the original format, keeping `num_codebooks` of its codebooks."""
    seanet, quantizer, transformer = (_get(config, key) for key in ("seanet", "quantizer", "transformer"))
    _require_values(seanet, {"channels": 1, "n_residual_layers": 1, "pad_mode": "constant", "norm": "none"})
    _require_values(transformer, {"norm": "layer_norm", "gating": "none", "positional_embedding": "rope"})
    strides = tuple(int(ratio) for ratio in reversed(_get(seanet, "ratios")))
    sample_rate_hz = int(_get(config, "sample_rate"))
    latent_rate_hz = sample_rate_hz / _product(strides)
    return MimiConfig(
        sample_rate_hz=sample_rate_hz,
        num_filters=int(_get(seanet, "n_filters")),
        strides=strides,
        kernel_size=int(_get(seanet, "kernel_size")),
        residual_kernel_size=int(_get(seanet, "residual_kernel_size")),
        last_kernel_size=int(_get(seanet, "last_kernel_size")),
        compress=int(_get(seanet, "compress")),
        dim=int(_get(seanet, "dimension")),
        num_layers=int(_get(transformer, "num_layers")),
        num_heads=int(_get(transformer, "num_heads")),
        mlp_dim=int(_get(transformer, "dim_feedforward")),
        context=int(_get(transformer, "context")),
        rope_theta=float(_get(transformer, "max_period")),
        norm_eps=1e-5,  # moshi `create_norm_fn` for layer_norm
        downsample_stride=round(latent_rate_hz / float(_get(config, "frame_rate"))),
        codebook_size=int(_get(quantizer, "bins")),
        codebook_dim=int(_get(quantizer, "dimension")),
        num_codebooks=_codebooks(num_codebooks, int(_get(quantizer, "n_q"))),
        num_semantic=1,
    )


def decoder_config_from_trfs(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a `config.json` of the -trfs format.

    Raises:
        FormatError: a key is missing, or the attention has grouped heads or a head size we do not implement.
    """
    _require_values(config, {"hidden_act": "silu", "num_key_value_heads": _get(config, "num_attention_heads")})
    dim, heads = int(_get(config, "hidden_size")), int(_get(config, "num_attention_heads"))
    _require_values(config, {"head_dim": dim // heads})
    return DecoderConfig(
        dim=dim,
        num_layers=int(_get(config, "num_hidden_layers")),
        num_heads=heads,
        mlp_dim=int(_get(config, "ffn_dim")) // 2,
        context=int(_get(config, "sliding_window")),
        rope_theta=_rope_theta(config),
        norm_eps=float(_get(config, "rms_norm_eps")),
        num_codebooks=int(_get(config, "num_codebooks")),
        audio_card=int(_get(config, "codebook_vocab_size")) - 1,
        text_card=int(_get(config, "vocab_size")) - 1,
    )


def speech_config_from_trfs(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], generation: Mapping[str, Any]
) -> SpeechConfig:
    """Read what `config.json`, `preprocessor_config.json` and `generation_config.json` say about padding and ids."""
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    return SpeechConfig(
        prefix_seconds=float(preprocessor.get("audio_silence_prefix_seconds", 0.0)),
        delay_seconds=float(_get(preprocessor, "audio_delay_seconds")),
        padding_id=int(_get(config, "pad_token_id")),
        word_start_id=0,  # moshi's class default; no -trfs file has a key for it
        hf_bos_row=None if bos is None else int(bos),
    )


def mimi_config_from_trfs(codec: Mapping[str, Any], *, num_codebooks: int) -> MimiConfig:
    """Read the `codec_config` of a -trfs `config.json`, keeping `num_codebooks` of its codebooks."""
    _require_values(codec, {"use_causal_conv": True, "pad_mode": "constant", "use_conv_shortcut": False})
    _require_values(codec, {"num_residual_layers": 1, "audio_channels": 1, "hidden_act": "gelu"})
    return MimiConfig(
        sample_rate_hz=int(_get(codec, "sampling_rate")),
        num_filters=int(_get(codec, "num_filters")),
        strides=tuple(int(ratio) for ratio in reversed(_get(codec, "upsampling_ratios"))),
        kernel_size=int(_get(codec, "kernel_size")),
        residual_kernel_size=int(_get(codec, "residual_kernel_size")),
        last_kernel_size=int(_get(codec, "last_kernel_size")),
        compress=int(_get(codec, "compress")),
        dim=int(_get(codec, "hidden_size")),
        num_layers=int(_get(codec, "num_hidden_layers")),
        num_heads=int(_get(codec, "num_attention_heads")),
        mlp_dim=int(_get(codec, "intermediate_size")),
        context=int(_get(codec, "sliding_window")),
        rope_theta=_rope_theta(codec),
        norm_eps=float(_get(codec, "norm_eps")),
        downsample_stride=2,  # transformers derives it from frame rates that its class fixes to 25 and 12.5 Hz
        codebook_size=int(_get(codec, "codebook_size")),
        codebook_dim=int(_get(codec, "codebook_dim")),
        num_codebooks=_codebooks(num_codebooks, int(_get(codec, "num_quantizers"))),
        num_semantic=int(_get(codec, "num_semantic_quantizers")),
    )


def _require_heads(dim: int, num_heads: int, context: int) -> None:
    if num_heads < 1 or dim % (2 * num_heads) or context < 1:
        raise FormatError(
            f"attention of dim {dim} in {num_heads} heads over a window of {context} cannot be: heads divide the dim "
            "into even parts, and the window is at least 1"
        )


def _get(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise FormatError(f"the checkpoint's config has no {key!r}; found {', '.join(sorted(config))}")
    return config[key]


def _require_values(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if config.get(key) not in (None, value):  # transformers writes null for what its class derives
            raise FormatError(f"the checkpoint's config has {key}={config[key]!r}; this model is built for {value!r}")


def _rope_theta(config: Mapping[str, Any]) -> float:
    # transformers 4 wrote `rope_theta`, transformers 5 writes `rope_parameters`; their class defaults differ by a
    # factor of ten, so a file that says neither is refused rather than guessed.
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or _get(config, "rope_theta"))


def _codebooks(wanted: int, available: int) -> int:
    if wanted > available:
        raise FormatError(f"the decoder reads {wanted} codebooks, but the codec makes only {available}")
    return wanted


def _product(values: tuple[int, ...]) -> int:
    product = 1
    for value in values:
        product *= value
    return product
