"""A causal transformer that leaves remembering to the memory it is given; Mimi and the decoder both use it."""

# B rows, T positions, D channels, H heads, E channels per head.

from collections.abc import Callable

from torch import Tensor, nn

from models.layers import add_and_norm, rotate
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
        if not memory.rotates:
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
        x_BTD, branch_BTD = self.open(x_BTD, None, layer, memory)
        return x_BTD + branch_BTD

    def open(self, x_BTD: Tensor, branch_BTD: Tensor | None, layer: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """Everything but the last sum, which the norm of the next block takes along: -> its two terms.

        Args:
            branch_BTD: what the block before has left to be added to x.
        """
        x_BTD, normed_BTD = add_and_norm(x_BTD, branch_BTD, self.norm1)
        heard_BTD = self.scale1(self.attention(normed_BTD, layer, memory))
        x_BTD, normed_BTD = add_and_norm(x_BTD, heard_BTD, self.norm2)
        return x_BTD, self.scale2(self.mlp(normed_BTD))


class Transformer(nn.Module):
    """Blocks in order."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x_BTD: Tensor, memory: Memory) -> Tensor:
        branch_BTD = None
        for index, block in enumerate(self.layers):
            assert isinstance(block, Block)
            x_BTD, branch_BTD = block.open(x_BTD, branch_BTD, index, memory)
        return x_BTD if branch_BTD is None else x_BTD + branch_BTD
