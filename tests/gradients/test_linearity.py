"""The lifted direction against the fit's own gradient, and margins along it against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_gradients import adapted, batch_of

from ray_ensemble.gradients.linearity import (
    InnerProduct,
    Linearity,
    LinearityProbe,
    LinearityUnit,
    lift,
    lora_parameters,
    margins_along,
    norm,
)
from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.projection import Projection
from ray_ensemble.models import label_scores, margins


@pytest.fixture(params=[False, True], ids=["fresh", "warm"])
def model(request, tiny_model, tmp_path):
    return adapted(tiny_model, tmp_path, warm=request.param)


def test_lifting_is_the_weighted_sum_of_per_example_gradients(model, encoded):
    """Projected, the lifted step equals Σ shares·φ over pairwise rows."""
    task = encoded["options"]
    batch = batch_of(task, range(5))
    shares = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    delta = lift(model, [(batch, shares)])
    assert not any(p.requires_grad for p in lora_parameters(model).values())
    projection = Projection(48, 3)
    ours = sum(projection.apply(name, value[None]) for name, value in delta.items())[0]
    found = GradientCollector(model, projection).collect([batch], "classes").features
    want = torch.zeros(48)
    for n in range(5):
        y = int(batch.labels[n])
        for column, k in enumerate(k for k in range(4) if k != y):
            want += shares[n, column] * (found[n, y] - found[n, k])
    assert torch.linalg.norm(ours - want) < 1e-4 * torch.linalg.norm(want)


def test_predictions_hold_to_first_order_and_no_further(model, encoded):
    batches = [batch_of(encoded["films"], range(6)), batch_of(encoded["options"], range(6))]
    delta = lift(model, [(batches[0], torch.ones(6, 1))])
    before = {name: p.clone() for name, p in lora_parameters(model).items()}
    factors = [1e-1, 1e-2]
    f0, predicted, real = margins_along(model, batches, delta, [f / norm(delta) for f in factors])
    remainders = np.abs(real - predicted).max(axis=1)
    changes = np.abs(real - f0).max(axis=1)
    assert changes[0] > 1e-3
    assert remainders[1] < 0.05 * changes[1], "ten times nearer, the remainder is a hundred times smaller"
    assert remainders[0] > 10 * remainders[1]
    with torch.no_grad():
        direct = torch.cat([margins(label_scores(model, b), b.labels) for b in batches])
    np.testing.assert_allclose(f0, direct.double().numpy(), rtol=1e-4, atol=1e-4)
    for name, p in lora_parameters(model).items():
        assert torch.equal(p, before[name])


def test_inner_product_is_that_of_all_entries():
    gradients, direction = torch.randn(4, 3, 5), torch.randn(3, 5)
    found = InnerProduct({"a": direction}).apply("a", gradients)
    torch.testing.assert_close(found[:, 0], (gradients * direction).sum((1, 2)))
    assert not InnerProduct({"a": direction}).apply("b", gradients).any()


def test_a_trained_adapter_is_its_own_direction(tiny_model, encoded, tmp_path):
    from ray_ensemble.gradients import ReplicaSpec
    from ray_ensemble.models import save_adapter

    start = adapted(tiny_model, tmp_path)
    trained = adapted(tiny_model, tmp_path, warm=True)
    save_adapter(trained, tmp_path / "trained", "default")
    task = encoded["films"]
    probe = LinearityProbe(ReplicaSpec(str(tiny_model), "none", str(tmp_path / "init"), 0), 1, 200)
    found: Linearity = probe.measure(
        LinearityUnit(((task.label_ids, task["train"][:5]),), adapter=tmp_path / "trained")
    )
    a, b = lora_parameters(start), lora_parameters(trained)
    distance = norm({name: b[name].detach() - a[name].detach() for name in a}) / norm(a)
    assert found.distances == pytest.approx((distance,), rel=1e-5)
    with torch.no_grad():
        batch = batch_of(task, range(5))
        real = margins(label_scores(trained, batch), batch.labels).double().numpy()
    np.testing.assert_allclose(np.sort(found.real[0]), np.sort(real), rtol=1e-4, atol=1e-5)
    (row,) = found.squares()
    assert row["remainder"] == pytest.approx(float(((found.real - found.predicted) ** 2).sum()))
