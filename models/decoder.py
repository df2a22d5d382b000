"""The delayed-streams decoder: audio codes and the last text token in, logits of the next text token out."""

# B rows (slots), T frames, K codebooks, D channels, V text ids.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import DecoderConfig
from models.layers import GatedMLP, RMSNorm
from models.memory import AttentionSpec, Memory, RingCache, WholeClip
from models.transformer import Attention, Block, Transformer


class Decoder(nn.Module):
    """33 summed embeddings per frame, a windowed transformer, one text head; no depformer.

    The input at position 0 is BOS in all 33 places; at position t it is the text token of t - 1 and the codes of audio
    frame t - 1. The text row `text_card` and the row `audio_card` of every codebook are BOS.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_spec = AttentionSpec(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            context=config.context,
            rope_theta=config.rope_theta,
        )
        self.text_embedding = _embedding(config.text_card + 1, config.dim)
        # The K tables in one, so that a frame is one gather and one sum.
        self.audio_embedding = _embedding(config.num_codebooks * (config.audio_card + 1), config.dim)
        self.transformer = Transformer([self._block() for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.text_head = nn.Linear(config.dim, config.text_card, bias=False)
        self.extra_heads = nn.ModuleList(
            nn.Linear(config.dim, config.extra_head_dim, bias=False) for _ in range(config.num_extra_heads)
        )

    def _block(self) -> Block:
        config = self.config
        return Block(
            attention=Attention(config.dim, config.num_heads),
            mlp=GatedMLP(config.dim, config.mlp_dim),
            make_norm=lambda: RMSNorm(config.dim, eps=config.norm_eps),
            make_scale=nn.Identity,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.norm.weight.dtype

    def new_cache(self, num_slots: int, *, max_frames: int = 1) -> RingCache:
        """An empty cache for `num_slots` streams which take at most `max_frames` frames a pass."""
        return RingCache(
            self.attention_spec, num_rows=num_slots, max_new=max_frames, device=self.device, dtype=self.dtype
        )

    def embed_audio(self, codes_BKT: Tensor) -> Tensor:
        """Sum the K codebook embeddings of every frame: `[B, K, T]` -> `[B, T, D]`."""
        rows_per_codebook = self.config.audio_card + 1
        offset_K1 = torch.arange(self.config.num_codebooks, device=codes_BKT.device)[:, None] * rows_per_codebook
        rows_BTK = (codes_BKT.long() + offset_K1).transpose(1, 2)
        summed = F.embedding_bag(rows_BTK.flatten(0, 1), self.audio_embedding.weight, mode="sum")
        return summed.unflatten(0, rows_BTK.shape[:2])

    def shared_row(self, row: int) -> Tensor:
        """Row of transformers' single table, `[text rows | codebook 0 | codebook 1 | ...]`: `[D]`."""
        num_text = self.config.text_card + 1
        return self.text_embedding.weight[row] if row < num_text else self.audio_embedding.weight[row - num_text]

    def hidden(self, x_BTD: Tensor, memory: Memory) -> Tensor:
        """Transformer and final norm over summed embeddings: `[B, T, D]` -> `[B, T, D]`."""
        return self.norm(self.transformer(x_BTD, memory))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """`[B, T, D]` -> float32 `[B, T, V]`."""
        return self.text_head(hidden_BTD).float()

    def pauses(self, hidden_BTD: Tensor) -> Tensor:
        """Semantic voice activity, `[B, T, heads]`: the probability that a pause of 0.5, 1, 2, 3 s has begun.

        Only the -candle 1B checkpoint has these heads. Source: moshi `LMGen.step_with_extra_heads`, first class.
        """
        return torch.stack([head(hidden_BTD).float().softmax(-1)[..., 0] for head in self.extra_heads], dim=-1)

    def clip_hidden(self, text_BT: Tensor, codes_BKT: Tensor) -> Tensor:
        """Hidden states `[B, T + 1, D]` of whole clips under teacher forcing, the sliding window honoured throughout.

        Args:
            text_BT: the text token of every position but the last, `[B, T]`.
            codes_BKT: the codes of the T audio frames.
        """
        num_rows, _, num_frames = codes_BKT.shape
        text = F.pad(text_BT, (1, 0), value=self.config.text_card)
        codes = F.pad(codes_BKT, (1, 0), value=self.config.audio_card)
        clip = WholeClip(self.attention_spec, num_rows=num_rows, length=num_frames + 1, device=self.device)
        return self.hidden(self.embed_audio(codes) + self.text_embedding(text), clip)

    def clip_logits(self, text_BT: Tensor, codes_BKT: Tensor) -> Tensor:
        """Float32 logits `[B, T + 1, V]` of whole clips under teacher forcing; see `clip_hidden`."""
        return self.logits(self.clip_hidden(text_BT, codes_BKT))

    def loss(self, target_BN: Tensor, codes_BKT: Tensor, *, ignore_id: int = -100) -> Tensor:
        """Mean cross-entropy of the N = T + 1 tokens of clips of T frames, given the tokens before each: a scalar.

        Positions whose target is `ignore_id` do not count; as inputs they are taken as BOS and should lie at the end.
        """
        inputs = target_BN[:, :-1].clone()
        inputs[inputs == ignore_id] = self.config.text_card
        logits = self.clip_logits(inputs, codes_BKT)
        return F.cross_entropy(logits.flatten(0, 1), target_BN.flatten(), ignore_index=ignore_id)


def _embedding(num_rows: int, dim: int) -> nn.Embedding:
    """A table without values yet. Drawing random ones on the meta device makes torch import its compiler: 2 s."""
    return nn.Embedding(num_rows, dim, _weight=torch.zeros(num_rows, dim))
