"""Named shapes and random weights: what speed depends on, without the gigabytes that make transcripts good.

How many positions look-ahead gains depends on what the tokens are, and random weights know no silence: of that, they
say only the worst case.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from models.config import RELEASED_MIMI, DecoderConfig, MimiConfig, SpeechConfig, mimi_config_from_original
from models.decoder import Decoder
from models.mimi import MimiEncoder

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Everything of a checkpoint but its weights and its tokenizer."""

    decoder: DecoderConfig
    mimi: MimiConfig
    speech: SpeechConfig


def random_decoder(
    config: DecoderConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Decoder:
    """A decoder whose tokens vary from frame to frame."""
    return _random(lambda: Decoder(config), device, dtype, seed)


def random_mimi(config: MimiConfig, *, device: torch.device | str = "cpu", seed: int = 0) -> MimiEncoder:
    """A Mimi encoder in float32 whose codes vary from frame to frame."""
    return _random(lambda: MimiEncoder(config), device, torch.float32, seed)


def _random(build: Callable[[], Module], device: torch.device | str, dtype: torch.dtype, seed: int) -> Module:
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device)
    rng = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = parameter.detach()
        if values.dim() == 1:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        elif "embedding" in name or "codebooks" in name:
            values.normal_(generator=rng)
        else:
            values.normal_(0, 1.2 / math.sqrt(values[0].numel()), generator=rng)
    return module.eval().requires_grad_(False)


def _decoder(**dims: Any) -> DecoderConfig:
    return DecoderConfig(rope_theta=100000.0, norm_eps=1e-8, **dims)


def _mimi(
    *, num_filters: int, dim: int, num_layers: int, codebook_size: int, code_dim: int, num_codebooks: int, context: int
) -> MimiConfig:
    """The released codec with some of its dims changed."""
    sections: dict[str, Any] = dict(RELEASED_MIMI)
    changed = sections | {
        "seanet": sections["seanet"] | {"n_filters": num_filters, "dimension": dim},
        "quantizer": sections["quantizer"] | {"bins": codebook_size, "dimension": code_dim, "n_q": num_codebooks},
        "transformer": sections["transformer"]
        | {"d_model": dim, "num_layers": num_layers, "dim_feedforward": 4 * dim, "context": context},
    }
    return mimi_config_from_original(changed, num_codebooks=num_codebooks)


def _speech(*, prefix_seconds: float, delay_seconds: float) -> SpeechConfig:
    return SpeechConfig(
        prefix_seconds=prefix_seconds, delay_seconds=delay_seconds, padding_id=3, word_start_id=0, top_k=50
    )


_RELEASED_MIMI = mimi_config_from_original(RELEASED_MIMI, num_codebooks=32)

SHAPES: Mapping[str, Shape] = {
    "2.6b": Shape(
        decoder=_decoder(
            dim=2048,
            num_layers=48,
            num_heads=32,
            mlp_dim=5632,
            context=375,
            num_codebooks=32,
            audio_card=2048,
            text_card=4000,
        ),
        mimi=_RELEASED_MIMI,
        speech=_speech(prefix_seconds=1.0, delay_seconds=2.5),
    ),
    "1b": Shape(
        decoder=_decoder(
            dim=2048,
            num_layers=16,
            num_heads=16,
            mlp_dim=5632,
            context=750,
            num_codebooks=32,
            audio_card=2048,
            text_card=8000,
        ),
        mimi=_RELEASED_MIMI,
        speech=_speech(prefix_seconds=0.0, delay_seconds=0.5),
    ),
    # For a CPU: the 2.6B's proportions, padding and window; a codec thinned out alike.
    "60m": Shape(
        decoder=_decoder(
            dim=512,
            num_layers=12,
            num_heads=8,
            mlp_dim=1408,
            context=375,
            num_codebooks=32,
            audio_card=2048,
            text_card=4000,
        ),
        mimi=_mimi(
            num_filters=16, dim=128, num_layers=4, codebook_size=2048, code_dim=64, num_codebooks=32, context=250
        ),
        speech=_speech(prefix_seconds=1.0, delay_seconds=2.5),
    ),
    # For tests.
    "tiny": Shape(
        decoder=_decoder(
            dim=64,
            num_layers=2,
            num_heads=4,
            mlp_dim=176,
            context=16,
            num_codebooks=8,
            audio_card=64,
            text_card=64,
        ),
        mimi=_mimi(num_filters=4, dim=32, num_layers=2, codebook_size=64, code_dim=16, num_codebooks=8, context=20),
        speech=_speech(prefix_seconds=0.0, delay_seconds=0.5),
    ),
}
