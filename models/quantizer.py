"""Split residual vector quantizer: latents in, K codes per frame out. Source: moshi `SplitResidualVectorQuantizer`."""

# B rows, D latent channels, T frames, N rows times frames, K codebooks, V codes per codebook, Q code channels.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import MimiConfig


class ResidualQuantizer(nn.Module):
    """Codebooks in a row: each names the nearest vector to what the ones before left over."""

    def __init__(self, *, latent_dim: int, code_dim: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(latent_dim, code_dim, bias=False)
        self.codebooks_KVQ = nn.Parameter(torch.empty(num_codebooks, codebook_size, code_dim))

    def forward(self, latents_BTD: Tensor) -> Tensor:
        """-> codes `[B, K, T]`."""
        residual_NQ = self.input_proj(latents_BTD).flatten(0, 1)
        codes: list[Tensor] = []
        for codebook_VQ in self.codebooks_KVQ:
            # The same distance as both references, rounding and all: ties in deep codebooks are decided by it.
            codes_N = torch.cdist(residual_NQ[None], codebook_VQ[None], p=2)[0].argmin(dim=-1)
            residual_NQ = residual_NQ - F.embedding(codes_N, codebook_VQ)
            codes.append(codes_N.unflatten(0, latents_BTD.shape[:2]))
        return torch.stack(codes, dim=1)


class SplitQuantizer(nn.Module):
    """One quantizer for meaning, one for sound; both read the same latent, not each other's rest."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.semantic = ResidualQuantizer(
            latent_dim=config.dim,
            code_dim=config.codebook_dim,
            num_codebooks=min(config.num_semantic, config.num_codebooks),
            codebook_size=config.codebook_size,
        )
        self.acoustic = ResidualQuantizer(
            latent_dim=config.dim,
            code_dim=config.codebook_dim,
            num_codebooks=max(0, config.num_codebooks - config.num_semantic),
            codebook_size=config.codebook_size,
        )

    def forward(self, latents_BDT: Tensor) -> Tensor:
        """-> codes `[B, K, T]`, semantic codebooks first."""
        latents_BTD = latents_BDT.transpose(1, 2)
        quantizers = [q for q in (self.semantic, self.acoustic) if q.codebooks_KVQ.shape[0]]
        return torch.cat([quantizer(latents_BTD) for quantizer in quantizers], dim=1)
