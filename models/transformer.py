"""A causal transformer that leaves remembering to the memory it is given; Mimi and the decoder both use it."""

# B rows, T positions, D channels, H heads, E channels per head.

from collections.abc import Callable

from torch import Tensor, nn

from models.layers import rotate
from models.memory import Memory


class Attention(nn.Module):
    """Multi-head self-attention, no biases; q, k and v come from one product."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.num_heads = num_heads

    def forward(self, x_BTD: Tensor, layer: int, memory: Memory) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = rotate(q, memory.cos, memory.sin), rotate(k, memory.cos, memory.sin)
        return self.out(memory.attend(layer, q, k, v).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch, optionally scaled."""

    def __init__(
        self,
        *,
        attention: Attention,
        mlp: nn.Module,
        make_norm: Callable[[], nn.Module],
        make_scale: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.scale1 = make_norm(), attention, make_scale()
        self.norm2, self.mlp, self.scale2 = make_norm(), mlp, make_scale()

    def forward(self, x_BTD: Tensor, layer: int, memory: Memory) -> Tensor:
        x_BTD = x_BTD + self.scale1(self.attention(self.norm1(x_BTD), layer, memory))
        return x_BTD + self.scale2(self.mlp(self.norm2(x_BTD)))


class Transformer(nn.Module):
    """Blocks in order."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x_BTD: Tensor, memory: Memory) -> Tensor:
        for index, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, index, memory)
        return x_BTD
