"""The random projection φ = Pᵀg without the matrix.

P is a D×d matrix scaled so that inner products are kept on average. It is never stored: each sign is a bit of a
counter-based generator, a function of (seed, canonical parameter name, element, column). Every worker, shard and block size
has therefore the same map to the last bit, and the first columns of a larger d are those of a smaller one.

Two maps are known. `rademacher`, the paper's, has an independent sign for every element and column. `kronecker` multiplies a
parameter's gradient G (p, q) from both sides, φ = vec(LᵀGR) with L (p, d₁) and R (q, d₂) of signs, d₁·d₂ = d: it takes
p·d₁ + q·d₂ signs instead of p·q·d and its inner products are right on average too, but their variance is larger, since the
d entries are not independent (docs/gradients.md has the measured effect on the estimate). A side with as many columns as
elements, as that of a small rank, is left as it is, which loses nothing. Where both are, every element still has a sign, without
which the gradients of different parameters would be added up as if they were of one.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

ProjectionKind = Literal["rademacher", "kronecker"]

_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_COLUMNS = 65536  # columns reserved for each element, so that a sign does not depend on d
_SIGN, _MINUS_ONE = -0x80000000, -0x40800000  # of IEEE single precision, as int32
_BLOCK_BYTES = 2 << 20  # of signs held at once: they stay in the cache until they are used


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch holds it in."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), in place: a bijection of words that scatters counters."""
    for bits, factor in ((30, _MIX1), (27, _MIX2), (31, None)):
        # Torch's right shift drags the sign along; the mask makes it a logical one.
        z ^= (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
        if factor is not None:
            z *= _signed(factor)
    return z


class Projection:
    """The map from gradients of named parameters to features of `dim` entries.

    Args:
        dim: d, at most 65,536.
        seed: of the signs.
        device: where signs are made; the map is the same on every device.
        kind: `rademacher` or `kronecker`.
    """

    def __init__(
        self, dim: int, seed: int, device: torch.device | str = "cpu", kind: ProjectionKind = "rademacher"
    ) -> None:
        self.dim = dim
        self.seed = seed
        self.kind = kind
        self.device = torch.device(device)
        self._shifts = torch.arange(31, -1, -1, dtype=torch.int32, device=self.device)

    def signs(self, name: str, start: int, stop: int, columns: int | None = None) -> Tensor:
        """Rows start…stop of a parameter's part of √d·P: (stop − start, columns) float32, each entry −1 or +1."""
        columns = self.dim if columns is None else columns
        words = math.ceil(columns / 64)
        digest = hashlib.sha256(f"{self.seed}\n{name}".encode()).digest()
        key = _signed(int.from_bytes(digest[:8], "little"))
        element = torch.arange(start, stop, dtype=torch.int64, device=self.device)[:, None]
        word = torch.arange(words, dtype=torch.int64, device=self.device)
        counter = element * (_COLUMNS // 64) + word + 1  # (rows, words)
        bits = _mix(counter.mul_(_signed(_GAMMA)).add_(key))
        # Each bit moves to where a float has its sign, under the exponent of 1; halves of a word come low one first.
        halves = bits.view(torch.int32)[:, :, None] << self._shifts  # (rows, 2·words, 32)
        halves.bitwise_and_(_SIGN).bitwise_xor_(_MINUS_ONE)
        return halves.view(torch.float32).view(stop - start, words * 64)[:, :columns]

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Project a parameter's per-example gradients.

        Args:
            name: the parameter's canonical name.
            gradients: (N, p, q) gradients of that parameter.

        Returns:
            (N, d) float32: this parameter's share of φ = Pᵀg; shares of all parameters add up.
        """
        gradients = gradients.to(torch.float32)
        if self.kind == "kronecker":
            return self._two_sided(name, gradients)
        flat = gradients.flatten(1)  # (N, p·q)
        total = torch.zeros(flat.shape[0], self.dim, dtype=torch.float32, device=flat.device)
        block = max(1, _BLOCK_BYTES // (4 * 64 * math.ceil(self.dim / 64)))
        for start in range(0, flat.shape[1], block):
            stop = min(start + block, flat.shape[1])
            total.addmm_(flat[:, start:stop], self.signs(name, start, stop))  # (N, p') @ (p', d)
        return total.mul_(1.0 / math.sqrt(self.dim))

    def _two_sided(self, name: str, gradients: Tensor) -> Tensor:
        count, rows, columns = gradients.shape
        left, right = kronecker_factors(self.dim, rows, columns)
        if (left, right) == (rows, columns):
            return gradients.flatten(1) * self.signs(name, 0, rows * columns, 1).T  # (N, p·q) * (1, p·q)
        half = gradients
        if right != columns:
            half = gradients.reshape(-1, columns) @ self.signs(
                f"{name}\nright", 0, columns, right
            )  # (N·p, q) @ (q, d₂)
            half = half.mul_(1.0 / math.sqrt(right)).view(count, rows, right)
        if left == rows:
            return half.flatten(1)
        flat = half.transpose(1, 2).reshape(-1, rows)  # (N·d₂, p)
        whole = torch.zeros(flat.shape[0], left, dtype=torch.float32, device=gradients.device)
        block = max(1, _BLOCK_BYTES // (4 * 64 * math.ceil(left / 64)))
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            whole.addmm_(flat[:, start:stop], self.signs(f"{name}\nleft", start, stop, left))  # (N·d₂, p') @ (p', d₁)
        return whole.mul_(1.0 / math.sqrt(left)).view(count, right * left)


def signs_per_element(kind: ProjectionKind, dim: int, rank: int) -> int:
    """Multiply-adds that an element of a LoRA gradient takes part in; `kronecker` keeps one side of it, the rank, whole."""
    return dim if kind == "rademacher" else dim // kronecker_factors(dim, dim, rank)[1]


def kronecker_factors(dim: int, rows: int, columns: int) -> tuple[int, int]:
    """d₁·d₂ = d for a gradient of `rows` × `columns`: the divisors of d nearest to the shape's own proportion.

    A side is never given more columns than it has elements while a divisor allows it, since those would only repeat.
    """
    divisors = [k for k in range(1, dim + 1) if dim % k == 0]
    # The smaller side, the rank, is kept whole where d allows it.
    if columns <= rows:
        right = max(k for k in divisors if k <= columns)
        return dim // right, right
    left = max(k for k in divisors if k <= rows)
    return left, dim // left
