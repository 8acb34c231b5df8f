"""Hooked per-example gradients against torch.autograd.grad, one example at a time."""

from __future__ import annotations

import pytest
import torch
from tiny_gradients import CPU, adapted, batch_of

from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.projection import Projection
from ray_ensemble.models import label_scores, load_base, margins
from ray_ensemble.tasks import EncodedTask


def reference(model, task: EncodedTask, index: int, projection: Projection, value) -> torch.Tensor:
    """Pᵀ∇value by autograd on one unpadded example and a dense sign matrix for each parameter."""
    parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for p in parameters.values():
        p.requires_grad_(True)
    batch = batch_of(task, range(index, index + 1))
    gradients = torch.autograd.grad(value(label_scores(model, batch), batch.labels), list(parameters.values()))
    total = torch.zeros(projection.dim)
    for name, gradient in zip(parameters, gradients, strict=True):
        canonical = name.removeprefix("base_model.model.").replace(".default", "")
        total += gradient.flatten() @ projection.signs(canonical, 0, gradient.numel()) / projection.dim**0.5
    for p in parameters.values():
        p.requires_grad_(False)
    return total


@pytest.mark.parametrize("name", ["films", "options"])
@pytest.mark.parametrize("count", [1, 13])
@pytest.mark.parametrize(("quantization", "warm"), [("none", False), ("none", True), ("nf4", False), ("nf4", True)])
def test_margin_features_equal_autograd(tiny_model, encoded, tmp_path, name, count, quantization, warm):
    model = adapted(tiny_model, tmp_path, quantization, warm)
    projection = Projection(70, 5)
    task = encoded[name]
    want = torch.stack([reference(model, task, i, projection, lambda s, y: margins(s, y).sum()) for i in range(count)])
    collector = GradientCollector(model, projection)
    assert collector.fresh is not warm
    found = collector.collect([batch_of(task, range(count))], "margin")
    assert want.norm(dim=1).min() > 1e-3
    error = (found.features - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() < 1e-5


def test_class_features_equal_autograd_and_give_the_margin(tiny_model, encoded, tmp_path):
    from ray_ensemble.gradients.store import margins_of_classes

    model = adapted(tiny_model, tmp_path)
    projection = Projection(64, 0)
    task = encoded["options"]
    batch = batch_of(task, range(6))
    collector = GradientCollector(model, projection)
    found = collector.collect([batch], "classes")
    assert not found.features[:, 0].any()
    for k in range(1, 4):
        want = torch.stack(
            [reference(model, task, i, projection, lambda s, y, k=k: (s[:, k] - s[:, 0]).sum()) for i in range(6)]
        )
        assert ((found.features[:, k] - want).norm(dim=1) / want.norm(dim=1)).max() < 1e-5
    direct = collector.collect([batch], "margin")
    value, features = margins_of_classes(found.scores.numpy(), found.features.numpy(), batch.labels.numpy())
    torch.testing.assert_close(torch.from_numpy(value), direct.margins, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(features), direct.features, rtol=1e-4, atol=1e-5)


def test_multi_token_scores_are_sums_over_the_whole_word(tiny_model, encoded):
    model = load_base(tiny_model, "none", CPU)
    task = encoded["options"]
    assert all(len(ids) > 1 for ids in task.label_ids)
    assert len({ids[0] for ids in task.label_ids}) == 1, "the labels of this test share their first token"
    scores = label_scores(model, batch_of(task, range(5)))
    for n in range(5):
        for k, ids in enumerate(task.label_ids):
            sequence = torch.tensor([task["train"][n].prompt_ids + ids])
            log_probabilities = torch.log_softmax(model(input_ids=sequence).logits[0], dim=-1)
            start = len(task["train"][n].prompt_ids) - 1
            want = sum(log_probabilities[start + t, token] for t, token in enumerate(ids))
            torch.testing.assert_close(scores[n, k], want, rtol=1e-4, atol=1e-4)


def test_loss_is_log_one_plus_exp_of_minus_margin():
    scores = torch.tensor([[0.3, -1.2, 2.0], [0.1, 0.0, float("-inf")]])
    labels = torch.tensor([2, 0])
    loss = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(torch.nn.functional.softplus(-margins(scores, labels)), loss)
