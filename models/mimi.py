"""The Mimi encoder: 24 kHz mono audio in, K codes per 80 ms frame out. Its decoding half is not even built."""

# B rows, S samples, D latent channels, L latents, T frames, K codebooks.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import MimiConfig
from models.conv import CausalConv1d
from models.layers import GeluMLP, LayerNorm, LayerScale
from models.memory import AttentionSpec, RingCache, Window
from models.precision import Precision, float32_products
from models.quantizer import SplitQuantizer
from models.seanet import SEANet
from models.transformer import Attention, Block, Transformer

# How a last partial frame is completed. silence: zeros follow the audio (moshi's offline encoder). per-layer: every
# strided convolution completes its own input, SEANet's with zeros, the downsampling with its last latent
# (transformers' `codec_model.encode`). Only that one frame differs, and transformers never shows it to the decoder.
Ending = Literal["silence", "per-layer"]

# On a CPU, SEANet takes 2 s at a time, the rest of the encoder whatever it is given: tensors of 10 s leave the caches,
# and fresh pages cost as much as arithmetic. Codes are equal; 60M shape, one thread, in turns: 55 and 84 RTFx.
_CPU_SEANET_FRAMES = 25


@dataclass(slots=True, kw_only=True)
class MimiState:
    """Everything the encoder remembers of B streams between two calls. Owned by the caller."""

    conv_contexts: list[Tensor]  # per convolution of SEANet, [B, C, P]
    cache: RingCache
    latent_context: Tensor  # [B, D, P], the downsampling's
    started_B: Tensor  # bool: has the row seen audio?

    @torch.inference_mode()  # as in `encode`, whose tensors may not be written to elsewhere
    def reset(self, rows: Tensor) -> None:
        """Start the given rows (indices `[R]`) anew; the others notice nothing."""
        for context in self.conv_contexts:
            context[rows] = 0
        self.cache.reset(rows)
        self.latent_context[rows] = 0
        self.started_B[rows] = False


class MimiEncoder(nn.Module):
    """SEANet, a windowed transformer at 25 Hz, downsampling to 12.5 Hz, split residual quantizer."""

    def __init__(self, config: MimiConfig, *, window: Window = "exact") -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = "float32"
        self.attention_spec = AttentionSpec(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.dim // config.num_heads,
            context=config.context,
            rope_theta=config.rope_theta,
            window=window,
        )
        self.seanet = SEANet(config)
        self.transformer = Transformer([self._block() for _ in range(config.num_layers)])
        stride = config.downsample_stride
        self.downsample = CausalConv1d(config.dim, config.dim, 2 * stride, stride=stride, bias=False)
        self.quantizer = SplitQuantizer(config)

    def _block(self) -> Block:
        config = self.config
        return Block(
            attention=Attention(config.dim, config.num_heads),
            mlp=GeluMLP(config.dim, config.mlp_dim),
            make_norm=lambda: LayerNorm(config.dim, eps=config.norm_eps),
            make_scale=lambda: LayerScale(config.dim),
        )

    def set_precision(self, precision: Precision) -> "MimiEncoder":
        """Compute everything before the quantizer in less than float32, in place. Other precisions give other codes.

        float32 is strict also where torch's default is not. bfloat16 rounds the weights for good. The quantizer's
        distances are always strict float32: they lose half their digits as it is.
        """
        if precision == "bfloat16":
            for part in (self.seanet, self.transformer, self.downsample):
                part.bfloat16()
        self.precision = precision
        return self

    def new_state(self, num_rows: int, *, max_frames: int) -> MimiState:
        """State of `num_rows` streams that begin; `max_frames` bounds what one internal pass takes, and so memory."""
        weight = self.downsample.weight
        return MimiState(
            conv_contexts=self.seanet.new_contexts(num_rows),
            cache=RingCache(
                self.attention_spec,
                num_rows=num_rows,
                max_new=max_frames * self.config.downsample_stride,
                device=weight.device,
                dtype=weight.dtype,
            ),
            latent_context=self.downsample.new_context(num_rows),
            started_B=torch.zeros(num_rows, dtype=torch.bool, device=weight.device),
        )

    @torch.inference_mode()
    def encode(
        self,
        samples_BS: Tensor,
        state: MimiState | None = None,
        *,
        ending: Ending = "silence",
        moving_B: Tensor | None = None,
    ) -> Tensor:
        """Codes of the next S samples of every row: float32 `[B, S]` in [-1, 1] -> int64 `[B, K, T]`.

        With a `state` the call continues its streams and S must be whole frames; any cutting into calls gives the same
        codes. Without one the audio is complete, and a last partial frame is completed as `ending` says.

        Args:
            moving_B: bool, the rows that take part, all by default. The streams of the others stay where they are, and
                the codes that come out for them mean nothing.

        Raises:
            ValueError: S is not a multiple of the frame size although a state is given.
        """
        frame_samples = self.config.frame_samples
        missing = -samples_BS.shape[1] % frame_samples
        if state is None:
            state = self.new_state(samples_BS.shape[0], max_frames=self._default_frames(samples_BS.shape[1] + missing))
            if ending == "silence":
                samples_BS = F.pad(samples_BS, (0, missing))
        elif missing:
            raise ValueError(f"{samples_BS.shape[1]} samples are not whole frames of {frame_samples}")
        pass_samples = state.cache.max_new // self.config.downsample_stride * frame_samples
        pieces = [piece for piece in samples_BS.split(pass_samples, dim=1) if piece.shape[1]]
        codes = [self._encode(piece, state, moving_B) for piece in pieces]
        if not codes:
            return torch.empty(samples_BS.shape[0], self.config.num_codebooks, 0, dtype=torch.int64)
        return torch.cat(codes, dim=-1)

    def _default_frames(self, num_samples: int) -> int:
        # Ten seconds at a time: at 24 kHz and 64 channels, the first layers need 6 MB per second of audio and tensor.
        return max(1, min(125, num_samples // self.config.frame_samples))

    def _encode(self, samples_BS: Tensor, state: MimiState, moving_B: Tensor | None) -> Tensor:
        with float32_products("tf32" if self.precision == "tf32" else "ieee"):
            frames_BDT = self._frames(samples_BS.to(self.downsample.weight.dtype), state, moving_B)
        with float32_products("ieee"):
            return self.quantizer(frames_BDT.float())

    def _frames(self, samples_BS: Tensor, state: MimiState, moving_B: Tensor | None) -> Tensor:
        """-> what is quantized, `[B, D, T]`; the state of the moving rows goes on."""
        latents, conv_contexts = self._latents(samples_BS, state.conv_contexts)
        num_latents = latents.shape[-1]
        state.cache.begin(num_latents)
        latents = self.transformer(latents.transpose(1, 2), state.cache).transpose(1, 2)
        state.cache.advance(num_latents if moving_B is None else num_latents * moving_B)
        # The left context of a stream's first latent is that latent itself, repeated, not silence.
        context = torch.where(state.started_B[:, None, None], state.latent_context, latents[..., :1])
        if num_latents % self.config.downsample_stride:  # only at the end of a stream
            latents = F.pad(latents, (0, -num_latents % self.config.downsample_stride), mode="replicate")
        frames_BDT, latent_context = self.downsample(latents, context)
        if moving_B is None:
            state.conv_contexts, state.latent_context = conv_contexts, latent_context
            state.started_B |= True
        else:
            moved_B11 = moving_B[:, None, None]
            pairs = zip(conv_contexts, state.conv_contexts, strict=True)
            state.conv_contexts = [torch.where(moved_B11, after, before) for after, before in pairs]
            state.latent_context = torch.where(moved_B11, latent_context, state.latent_context)
            state.started_B |= moving_B
        return frames_BDT

    def _latents(self, samples_BS: Tensor, contexts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if samples_BS.device.type != "cpu":
            return self.seanet(samples_BS, contexts)
        latents: list[Tensor] = []
        for piece_BS in samples_BS.split(_CPU_SEANET_FRAMES * self.config.frame_samples, dim=1):
            piece_BDL, contexts = self.seanet(piece_BS, contexts)
            latents.append(piece_BDL)
        return torch.cat(latents, dim=-1), contexts
