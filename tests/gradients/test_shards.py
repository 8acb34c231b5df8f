"""A base cut into shards gives the features of the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import write_model

from ray_ensemble.config import AdapterConfig
from ray_ensemble.errors import InputError
from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.projection import Projection
from ray_ensemble.gradients.shard import GradientShard
from ray_ensemble.models import LabelTree, attach_adapters, draw_initial_adapter, load_base, make_batch
from ray_ensemble.models.shard import layer_count, load_shard, split_layers
from ray_ensemble.tasks import EncodedExample

CPU = torch.device("cpu")
LABELS = ((30, 31, 40), (30, 32, 41), (33,))


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("deep") / "model", layers=5)


def through_shards(shards: list[GradientShard], batch, kind: str):
    """What the pipeline of actors does, in one process."""
    hidden = None
    for shard in shards[:-1]:
        hidden = shard.forward("a", batch, kind, hidden)
    turned = shards[-1].turn(batch, kind, hidden)
    features, gradients = turned.features, turned.gradients
    for shard in reversed(shards[:-1]):
        gradients, share = shard.backward("a", gradients)
        features = features + share
    assert gradients is None, "nothing flows below the first shard"
    return turned.scores, features


@pytest.mark.parametrize("kind", ["margin", "classes"])
@pytest.mark.parametrize(("quantization", "count"), [("none", 2), ("none", 4), ("nf4", 3)])
def test_features_of_shards_add_up_to_those_of_the_whole(deep_model, tmp_path, quantization, count, kind):
    draw_initial_adapter(load_base(deep_model, "none", CPU), AdapterConfig(), tmp_path / "init")
    projection = Projection(100, 2)
    examples = [EncodedExample(tuple(range(5, 5 + n)), n % 3, False) for n in (9, 14, 4)]
    batch = make_batch(examples, [LabelTree.of(LABELS)] * 3, 3, 0, CPU)
    whole = attach_adapters(load_base(deep_model, quantization, CPU), {"default": tmp_path / "init"})
    want = GradientCollector(whole, projection).collect([batch], kind)
    shards, held = [], []
    for layers in split_layers(layer_count(deep_model), count):
        model = attach_adapters(load_shard(deep_model, quantization, CPU, layers), {"default": tmp_path / "init"})
        held.append(sum(p.nbytes for p in model.parameters()))
        shards.append(GradientShard(model, layers, projection))
    scores, features = through_shards(shards, batch, kind)
    torch.testing.assert_close(scores, want.scores, rtol=1e-5, atol=1e-5)
    expected = want.features if kind == "margin" else want.features[:, 1:].flatten(0, 1)
    assert ((features - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4
    # Weights per process: its layers and one embedding at most.
    layers = sum(p.nbytes for p in whole.get_base_model().model.layers.parameters())
    embedding = whole.get_input_embeddings().weight.nbytes
    assert max(held) < 1.1 * (layers * -(-5 // count) / 5 + embedding)


def test_more_shards_than_layers_are_refused():
    with pytest.raises(InputError, match="5 layers, so it cannot be split into 6"):
        split_layers(5, 6)
    assert [len(r) for r in split_layers(7, 3)] == [3, 2, 2]
