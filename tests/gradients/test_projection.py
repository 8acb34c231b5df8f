"""The matrix-free projection: a fixed map, whatever the block, the width or the device of the day."""

from __future__ import annotations

import hashlib

import pytest
import torch

from ray_ensemble.gradients import projection as module
from ray_ensemble.gradients.projection import Projection, kronecker_factors

MASK = (1 << 64) - 1


def slow_sign(seed: int, name: str, element: int, column: int) -> int:
    """One sign by arbitrary-precision integers: SplitMix64 at a counter."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8], "little")
    z = ((element * 1024 + column // 64 + 1) * 0x9E3779B97F4A7C15 + key) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return 1 if (z >> (column % 64)) & 1 else -1


def test_signs_equal_the_slow_generator():
    signs = Projection(130, 7).signs("layers.3.q_proj.lora_B.weight", 90, 110)
    for element in (90, 97, 109):
        for column in (0, 1, 15, 16, 63, 64, 100, 129):
            assert signs[element - 90, column] == slow_sign(7, "layers.3.q_proj.lora_B.weight", element, column)


def test_map_does_not_depend_on_block_or_width(monkeypatch):
    gradients = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    whole = Projection(400, 1).apply("a", gradients[:, :, None])
    dense = gradients.double() @ Projection(400, 1).signs("a", 0, 5000).double() / 20.0
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 16)
    torch.testing.assert_close(Projection(400, 1).apply("a", gradients[:, :, None]), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.double(), dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(Projection(100, 1).signs("a", 0, 50), Projection(400, 1).signs("a", 0, 50)[:, :100])


def test_maps_of_other_seeds_and_names_are_unrelated():
    base = Projection(512, 0).signs("a", 0, 512)
    for other in (Projection(512, 1).signs("a", 0, 512), Projection(512, 0).signs("b", 0, 512)):
        assert abs(float((base * other).mean())) < 0.01  # 262,144 products: five standard deviations


def test_inner_products_are_kept():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(8, 20000, generator=generator)
    phi = Projection(4096, 0).apply("a", g[:, :, None])
    exact, kept = g @ g.T, phi @ phi.T
    scale = exact.diagonal().sqrt()
    error = (kept - exact) / (scale[:, None] * scale)
    assert error.abs().max() < 5 / 4096**0.5


@pytest.mark.parametrize(("rows", "columns", "dim"), [(60, 4, 40), (4, 60, 40), (50, 7, 36), (3, 3, 64)])
def test_two_sided_map_is_the_kronecker_product_of_its_sides(rows, columns, dim):
    """Against the dense map of each side, the identity where a side is kept whole."""
    projection = Projection(dim, 2, "cpu", "kronecker")
    left, right = kronecker_factors(dim, rows, columns)
    assert left * right == dim

    def side(name, elements, wide):
        if wide == elements:
            return torch.eye(elements, dtype=torch.float64)
        return projection.signs(f"a\n{name}", 0, elements, wide).double() / wide**0.5

    gradients = torch.randn(5, rows, columns, generator=torch.Generator().manual_seed(1))
    want = side("left", rows, left).T @ gradients.double() @ side("right", columns, right)  # (N, d₁, d₂)
    if left != rows:
        want = want.transpose(1, 2)
    torch.testing.assert_close(projection.apply("a", gradients).double(), want.flatten(1), rtol=1e-4, atol=1e-4)


def test_two_sided_inner_products_are_right_on_average():
    g = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    exact = float((g[0] * g[1]).sum())
    found = []
    for seed in range(400):
        phi = Projection(64, seed, "cpu", "kronecker").apply("a", g)
        found.append(float(phi[0] @ phi[1]))
    spread = torch.tensor(found).std() / 20
    assert abs(float(torch.tensor(found).mean()) - exact) < 4 * float(spread)


@pytest.mark.parametrize("dim", [64, 256])
def test_parameters_are_not_added_up_as_one_under_the_two_sided_map(dim):
    """Of opposite gradients in two parameters, also where both sides are kept whole (64·4 elements, d = 256)."""
    g = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    norms = []
    for seed in range(60):
        projection = Projection(dim, seed, "cpu", "kronecker")
        phi = projection.apply("a", g) - projection.apply("b", g)
        norms.append(float(phi.square().sum() / (2 * g.square().sum())))
    assert torch.tensor(norms).mean() == pytest.approx(1.0, abs=0.25)
    assert min(norms) > 0.1


@pytest.mark.gpu
def test_signs_are_the_same_on_a_gpu():
    here = Projection(400, 3).signs("a", 0, 1000)
    assert torch.equal(Projection(400, 3, "cuda").signs("a", 0, 1000).cpu(), here)
