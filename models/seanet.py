"""The SEANet encoder: waveform in, one latent per 40 ms out. Source: moshi `seanet.py`, encoder half."""

# B rows, S samples, C channels, L latents.

from torch import Tensor, nn
from torch.nn import functional as F

from models.config import MimiConfig
from models.conv import CausalConv1d


class Stage(nn.Module):
    """One residual block, then a convolution that divides the rate by `stride` and doubles the channels."""

    def __init__(self, channels: int, *, stride: int, kernel_size: int, compress: int) -> None:
        super().__init__()
        self.narrow = CausalConv1d(channels, channels // compress, kernel_size)
        self.widen = CausalConv1d(channels // compress, channels, 1)
        self.down = CausalConv1d(channels, 2 * channels, 2 * stride, stride=stride)

    def forward(self, x: Tensor, contexts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        # In place where nobody else needs the value: these tensors are large, and a fresh one costs page faults.
        hidden, narrow = self.narrow(F.elu(x), contexts[0])
        hidden, widen = self.widen(F.elu(hidden, inplace=True), contexts[1])
        out, down = self.down(F.elu(hidden.add_(x), inplace=True), contexts[2])
        return out, [narrow, widen, down]


class SEANet(nn.Module):
    """Convolutions at ever lower rates."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        channels = config.num_filters
        self.first = CausalConv1d(1, channels, config.kernel_size)
        stages: list[Stage] = []
        for stride in config.strides:
            stages.append(
                Stage(channels, stride=stride, kernel_size=config.residual_kernel_size, compress=config.compress)
            )
            channels *= 2
        self.stages = nn.ModuleList(stages)
        self.last = CausalConv1d(channels, config.dim, config.last_kernel_size)

    def new_contexts(self, num_rows: int) -> list[Tensor]:
        """The left contexts of streams that begin, in the order `forward` uses them."""
        convs = [module for module in self.modules() if isinstance(module, CausalConv1d)]
        return [conv.new_context(num_rows) for conv in convs]

    def forward(self, samples_BS: Tensor, contexts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """-> latents `[B, C, L]` and the contexts of the next call; S is a multiple of the product of the strides."""
        x, first = self.first(samples_BS[:, None], contexts[0])
        after = [first]
        for index, stage in enumerate(self.stages):
            x, stage_contexts = stage(x, contexts[1 + 3 * index : 4 + 3 * index])
            after += stage_contexts
        x, last = self.last(F.elu(x, inplace=True), contexts[-1])
        return x, [*after, last]
