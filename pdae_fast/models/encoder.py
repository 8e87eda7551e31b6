"""E_phi: image -> z, a stack of stride-2 convolutions down to 4x4 with self-attention at 16x16."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import AttentionBlock, group_norm

ATTENTION_SIZE = 16
ATTENTION_HEADS = 4
FINAL_SIZE = 4


class Encoder(nn.Module):
    """x0 [B, C, S, S] in [-1, 1] -> z [B, latent_dim].

    The width doubles with every halving until the map is 16x16 (64 -> 128 at 64 px, 64 -> 128 -> 256 at 128 px) and
    stays constant after; the attention block has 4 heads in the legacy layout. S is a power of two from 32 up.
    """

    def __init__(self, image_size: int, input_channel: int = 3, latent_dim: int = 512, base_channel: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width, size = input_channel, image_size
        while size > FINAL_SIZE:
            if layers:
                layers += [group_norm(width), nn.SiLU()]
            if not layers:
                out = base_channel
            else:
                out = 2 * width if size > ATTENTION_SIZE else width
            layers.append(nn.Conv2d(width, out, 3, stride=2, padding=1))
            width, size = out, size // 2
            if size == ATTENTION_SIZE:
                layers.append(AttentionBlock(width, ATTENTION_HEADS, group_norm(width)))
        layers += [group_norm(width), nn.SiLU(), nn.Flatten(), nn.Linear(width * FINAL_SIZE**2, latent_dim)]
        self.encoder = nn.Sequential(*layers)

    def forward(self, x0: Tensor) -> Tensor:
        return self.encoder(x0.to(self.encoder[0].weight.dtype))

    def sequence(self) -> list[nn.Module]:
        """Its layers, each of which reads what the one before made; a SiLU only where a norm is before it."""
        return list(self.encoder)
