"""The decoder's batch: a fixed number of slots, each holding one stream at a time, all advanced by one pass.

Knows slots, not streams: who sits where, and when a stream is over, is the caller's business.
"""

# B slots, K codebooks, V text ids.

import torch
from torch import Tensor
from torch.nn import functional as F

from models.decoder import Decoder
from models.sampling import choose


class Slots:
    """State of B streams in the decoder, and the step that moves them.

    Args:
        decoder: the weights.
        num_slots: B.
        bos_row: row of transformers' shared table fed as the first text token; None for the model's own BOS.
        zero_logit: give the id `text_card` a logit of exactly 0, as the zero row of transformers' `lm_head` does.
        temperature: 0 for greedy.
        top_k: with a temperature, how many of the best ids may be drawn.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_slots: int,
        *,
        bos_row: int | None = None,
        zero_logit: bool = False,
        temperature: float = 0.0,
        top_k: int | None = None,
    ) -> None:
        self._decoder = decoder
        self._zero_logit = zero_logit
        self._temperature, self._top_k = temperature, top_k
        self._start_D = self._start_vector(bos_row)
        self._cache = decoder.new_cache(num_slots)
        self._last_B = torch.zeros(num_slots, dtype=torch.int64, device=decoder.device)
        self._seed_B = torch.zeros(num_slots, dtype=torch.int64, device=decoder.device)
        self.num_slots = num_slots

    def _start_vector(self, bos_row: int | None) -> Tensor:
        config = self._decoder.config
        text = self._decoder.shared_row(config.text_card if bos_row is None else bos_row)
        audio_bos = torch.full((1, config.num_codebooks, 1), config.audio_card, device=self._decoder.device)
        return text + self._decoder.embed_audio(audio_bos)[0, 0]

    def start(self, slot: int, *, seed: int = 0) -> None:
        """Empty one slot for a new stream; the others notice nothing. `seed` matters only with a temperature."""
        self._cache.reset(torch.tensor([slot], device=self._decoder.device))
        self._seed_B[slot] = seed

    @torch.inference_mode()
    def step(self, codes_BK: Tensor, active_B: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the active slots by one frame: -> token ids int64 `[B]` and log-probabilities float32 `[B]`.

        A slot's first step is its BOS step: its codes are not looked at. What is returned for a slot that is not
        active means nothing, and its state does not change.
        """
        position_B = self._cache.position_B
        frame = self._decoder.embed_audio(codes_BK[..., None])[:, 0] + self._decoder.text_embedding(self._last_B)
        x = torch.where((position_B == 0)[:, None], self._start_D, frame)[:, None]
        self._cache.begin(1)
        logits = self._decoder.logits(self._decoder.hidden(x, self._cache))[:, 0]
        if self._zero_logit:
            logits = F.pad(logits, (0, 1))
        ids_B, logprobs_B = choose(
            logits, temperature=self._temperature, top_k=self._top_k, seed_B=self._seed_B, step_B=position_B
        )
        self._last_B = torch.where(active_B, ids_B, self._last_B)
        self._cache.advance(active_B.long())
        return ids_B, logprobs_B
