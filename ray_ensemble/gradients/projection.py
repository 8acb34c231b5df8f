"""The random projection φ = Pᵀg without the matrix.

P is a D×d matrix of random signs scaled by 1/√d. It is never stored: each sign is a bit of a counter-based generator, a
function of (seed, canonical module name, element of the module's gradient, column). Every worker, shard and block size has
therefore the same map to the last bit, and the first columns of a larger d are those of a smaller one.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_COLUMNS = 65536  # columns reserved for each element, so that a sign does not depend on d
_BLOCK_BYTES = 8 << 20  # of signs held at once


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch holds it in."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own `>>` drags the sign along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that scatters counters."""
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    return z ^ _shift(z, 31)


class Projection:
    """The map from gradients of named modules to features of `dim` entries.

    Args:
        dim: d, at most 65,536.
        seed: of the signs.
        device: where signs are made; the map is the same on every device.
    """

    def __init__(self, dim: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.seed = seed
        self.device = torch.device(device)
        self._words = math.ceil(dim / 64)
        bits = torch.arange(65536, dtype=torch.int64)[:, None] >> torch.arange(16)  # (65536, 16)
        self._table = ((bits & 1) * 2 - 1).to(torch.float32).to(self.device)

    def signs(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start…stop of a module's part of √d·P: (stop − start, d) float32, each entry −1 or +1."""
        digest = hashlib.sha256(f"{self.seed}\n{name}".encode()).digest()
        key = _signed(int.from_bytes(digest[:8], "little"))
        element = torch.arange(start, stop, dtype=torch.int64, device=self.device)[:, None]
        word = torch.arange(self._words, dtype=torch.int64, device=self.device)
        counter = element * (_COLUMNS // 64) + word  # (rows, words)
        bits = _mix((counter + 1) * _signed(_GAMMA) + key)
        # Sixteen signs are looked up at a time; int16 halves come in little-endian order on every machine we run on.
        halves = bits.view(torch.int16).to(torch.int32) & 0xFFFF  # (rows, 4·words)
        signs = torch.nn.functional.embedding(halves, self._table)  # (rows, 4·words, 16)
        return signs.view(stop - start, self._words * 64)[:, : self.dim]

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Project a module's per-example gradients.

        Args:
            name: the module's canonical name.
            gradients: (N, p) flattened gradients of that module.

        Returns:
            (N, d) float32: this module's share of φ = Pᵀg; shares of all modules add up.
        """
        gradients = gradients.to(torch.float32)
        total = torch.zeros(gradients.shape[0], self.dim, dtype=torch.float32, device=gradients.device)
        block = max(1, _BLOCK_BYTES // (4 * 64 * self._words))
        for start in range(0, gradients.shape[1], block):
            stop = min(start + block, gradients.shape[1])
            total.addmm_(gradients[:, start:stop], self.signs(name, start, stop))  # (N, p') @ (p', d)
        return total.mul_(1.0 / math.sqrt(self.dim))
