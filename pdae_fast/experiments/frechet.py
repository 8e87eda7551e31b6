"""Frechet distance between sets of images by a feature network that the user supplies (with Inception: FID)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--fid", metavar="DATA", help="images to compare the results with as a set; needs --fid-network")
    p.add_argument("--fid-network", metavar="FILE", help="TorchScript network: uint8 [B, 3, H, W] to features [B, F]")


def check_options(args: argparse.Namespace) -> None:
    if (args.fid is None) != (args.fid_network is None):
        raise UserError("--fid and --fid-network go together: images to compare with, and the network that compares")


class FeatureNetwork:
    """A TorchScript network that turns images into features.

    It is called with uint8 [B, 3, H, W] (0 to 255), as FID's Inception networks in TorchScript and those of
    torchmetrics are, and with ``return_features=True`` where it takes that. Its result is flattened to [B, F].
    Raises UserError for a file that is not TorchScript.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        self.path, self.device = Path(path), device
        if not self.path.is_file():
            raise UserError(f"--fid-network {path}: no such file; expected a TorchScript network")
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"--fid-network {path}: not a TorchScript file ({str(error).splitlines()[0]})") from None
        arguments = [a.name for a in self.network.forward.schema.arguments]
        self.options = {"return_features": True} if "return_features" in arguments else {}

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """x [B, 1 or 3, H, W] in [-1, 1], quantised to 8 bits as a file would be -> float32 [B, F]."""
        pixels = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        try:
            features = self.network(pixels.to(self.device), **self.options)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"--fid-network {self.path} cannot run on uint8 {list(pixels.shape)}: {reason}") from None
        if not isinstance(features, Tensor) or len(features) != len(x):
            raise UserError(f"--fid-network {self.path} returns no tensor of {len(x)} rows; expected features [B, F]")
        return features.flatten(1).float().cpu()


class _Identity(nn.Module):
    """What torchmetrics runs as its network when it is handed features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


class FrechetDistance:
    """torchmetrics' Frechet distance over features that come in pieces; memory does not grow with them."""

    def __init__(self, reference: Iterable[np.ndarray]) -> None:
        """reference: pieces [n, F] of the real images' features."""
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError:
            raise UserError("--fid needs torchmetrics: pip install 'pdae_fast[metrics]'") from None
        self.metric = None
        self.images = 0
        for piece in reference:
            if self.metric is None:
                # The reference stays through `reset`, so that every row of a table is compared with it.
                self.metric = FrechetInceptionDistance(feature=_Identity(piece.shape[1]), reset_real_features=False)
            self.metric.update(torch.from_numpy(piece).double(), real=True)
            self.images += len(piece)
        if self.images < 2:
            raise UserError(
                f"--fid compares two sets; the reference has {self.images} readable images, expected 2 or more"
            )

    def __call__(self, features: Iterable[np.ndarray]) -> float | None:
        """The distance of these features [n, F] (in pieces) from the reference; None for fewer than two images."""
        self.metric.reset()
        count = 0
        for piece in features:
            self.metric.update(torch.from_numpy(piece).double(), real=False)
            count += len(piece)
        return float(self.metric.compute()) if count > 1 else None
