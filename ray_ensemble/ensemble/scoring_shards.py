"""Label scores on a base that is larger than one device: batches stream forward through a pipeline of shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_ensemble.config import GradientsConfig
from ray_ensemble.ensemble.adapter_switch import AdapterSwitch, adapter_name
from ray_ensemble.ensemble.scoring import ScoreRequest, batches_of, token_count
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.gradients.pipeline import Pipeline, ShardHolder, Wire, to_wire
from ray_ensemble.models.scoring import scores_of_logits
from ray_ensemble.models.shard import ShardRun
from ray_ensemble.tasks import EncodedExample


@dataclass(frozen=True)
class ScoringBatch:
    """What a shard needs to know of a batch: examples of one task, and the adapter and its name (None: the bare base)."""

    label_ids: tuple[tuple[int, ...], ...]
    examples: tuple[EncodedExample, ...]
    adapter: Path | str | None
    name: str | None


class ScoringShard(ShardHolder):
    """One shard of a replica that scores; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, config: GradientsConfig, shard: int) -> None:
        super().__init__(spec, config, shard)
        self._run = ShardRun(self.model, self.layers)
        self._adapters = AdapterSwitch(self.model)

    def forward(self, batch: ScoringBatch, hidden: Wire | None) -> Wire:
        """A batch through this shard: hidden states (N, T, H) for the next one, label scores (N, K) from the last."""
        import torch

        made = self.batch(batch.label_ids, batch.examples)
        with torch.inference_mode(), self._adapters.using(batch.adapter, batch.name):
            left = self._run(made, self.from_wire(hidden))
            return to_wire(scores_of_logits(left, made) if self._run.last else left)


class ShardedScoring(Pipeline):
    """A replica that scores."""

    shard_class = ScoringShard

    def score(self, request: ScoreRequest) -> dict[str, Any]:
        """As `ScoringReplica.score`, batch by batch the same."""
        import ray

        batches = batches_of(request, self.config.batch_tokens)
        name = None if request.adapter is None else adapter_name(request.adapter)
        scores = np.empty((len(request.examples), len(request.task.labels)), dtype=np.float32)

        def send(place: int) -> list[Any]:
            examples = tuple(request.examples[i] for i in batches[place])
            batch = ray.put(ScoringBatch(request.task.label_ids, examples, request.adapter, name))
            hidden = None
            for shard in self.shards:
                hidden = shard.forward.remote(batch, hidden)
            return [hidden]

        for indices, (found,) in zip(batches, self.streamed(len(batches), send), strict=True):
            scores[indices] = found
        return {"scores": scores, "tokens": token_count(request), "peak_memory_bytes": self.peak_memory_bytes()}
