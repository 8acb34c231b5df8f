"""A replica larger than one device: the layers of one base spread over Ray actors through which micro-batches stream.

The base is frozen and nothing is updated, so batches need not wait for one another: while one is on its way back, the next
ones are on their way out. Only hidden states, their gradients and d-vectors travel between actors. FSDP2 and
ZeRO-3 send weights instead, hundreds of times as many bytes a batch (docs/gradients.md).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import GradientsConfig
from ray_ensemble.errors import InputError
from ray_ensemble.gradients.per_example import Collected
from ray_ensemble.gradients.units import GradientUnit, ReplicaSpec, UnitResult
from ray_ensemble.models import (
    Batch,
    LabelTree,
    attach_adapters,
    default_device,
    make_batch,
    materialise,
    quiet_libraries,
)
from ray_ensemble.pool import PoolSize, bundle_of, map_units
from ray_ensemble.runtime import peak_memory_bytes
from ray_ensemble.storage import adapter_copy
from ray_ensemble.tasks import EncodedExample

Unit = TypeVar("Unit")
Wire = NDArray[Any]
Share = tuple[Wire, int]  # a shard's part of a batch's features, and the most bytes that its process has held


class ShardHolder:
    """One shard of a replica with its part of θ₀: what the actors of every kind of pass are made of.

    Raises:
        InputError: the base cannot be cut.
    """

    def __init__(self, spec: ReplicaSpec, config: GradientsConfig, shard: int) -> None:
        import torch

        from ray_ensemble.models.shard import layer_count, load_shard, split_layers

        quiet_libraries()
        torch.set_num_threads(config.threads)
        self.device = default_device()
        folder = materialise(spec.source)
        self.layers = split_layers(layer_count(folder), config.shards)[shard]
        self.model = attach_adapters(
            load_shard(folder, spec.quantization, self.device, self.layers),
            {"default": adapter_copy(spec.initial_adapter)},
        )
        self._weights = int(sum(p.nbytes for p in self.model.parameters()))
        self._pad_id = spec.pad_id

    def node(self) -> str:
        """The node that this shard is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def facts(self) -> dict[str, int]:
        """Bytes of the weights that this shard holds, and the most bytes that its process has held."""
        return {"weights": self._weights, "peak_memory": peak_memory_bytes()}

    def batch(self, label_ids: Sequence[Sequence[int]], examples: Sequence[EncodedExample]) -> Batch:
        """Examples of one task as tensors."""
        trees = [LabelTree.of(label_ids)] * len(examples)
        return make_batch(examples, trees, len(label_ids), self._pad_id, self.device)

    def from_wire(self, array: Wire | None) -> Any:
        """What another shard sent, on this one's device; None, which the first shard gets, stays None."""
        import torch

        if array is None:
            return None
        # Arrays from the object store are read-only views of shared memory.
        tensor = torch.from_numpy(np.array(array))
        return (tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor).to(self.device)


def to_wire(tensor: Any) -> Wire:
    """A tensor as a NumPy array, which Ray passes without pickling; bfloat16, unknown to NumPy, goes as its bits."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    array: Wire = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class Pipeline:
    """One replica as a pipeline of shards; the plain class behind the Ray actor that leads it, which holds no weights.

    Args:
        spec: how shards load the base and θ₀.
        config: shards, threads, and what the shards want besides.
        group: the placement group with a bundle for each shard.
        gpus: of one shard.
    """

    shard_class: type[ShardHolder]

    def __init__(self, spec: ReplicaSpec, config: GradientsConfig, group: Any, gpus: float) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        # Whatever is ready runs: a backward pass that has arrived, or the next batch forward.
        remote = ray.remote(num_cpus=config.threads, num_gpus=gpus, allow_out_of_order_execution=True)(self.shard_class)
        self.config = config
        self.shards = [
            remote.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=shard)
            ).remote(spec, config, shard)
            for shard in range(config.shards)
        ]
        # Batches in the pipeline, of all units together: enough to keep every shard busy, and a bound on its memory.
        self._room = threading.Semaphore(2 * config.shards)
        ray.get([shard.facts.remote() for shard in self.shards])  # until all are loaded

    def nodes(self) -> list[str]:
        """The node of each shard."""
        found: list[str] = self.get([shard.node.remote() for shard in self.shards])
        return found

    def facts(self) -> list[dict[str, int]]:
        """Weights and peak memory of each shard, in bytes."""
        found: list[dict[str, int]] = self.get([shard.facts.remote() for shard in self.shards])
        return found

    def peak_memory_bytes(self) -> int:
        """The most memory that one of the shards has held."""
        return max(facts["peak_memory"] for facts in self.facts())

    def get(self, references: Any) -> Any:
        """What shards have computed. Without one of its shards the replica is lost, and the pool replaces all of it.

        Raises:
            InputError: raised by a shard.
        """
        import ray

        try:
            return ray.get(references)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise
        except ray.exceptions.RayActorError:
            os._exit(1)

    def streamed(self, count: int, send: Callable[[int], list[Any]]) -> Iterator[list[Any]]:
        """What becomes of batches 0 … count − 1, in their order; as many are under way at once as the pipeline has room for.

        Args:
            count: of batches.
            send: sets a batch on its way and returns references to its results, which are in when it has left the pipeline.
        """
        under_way: deque[list[Any]] = deque()

        def take() -> list[Any]:
            found: list[Any] = self.get(under_way.popleft())
            self._room.release()
            return found

        for place in range(count):
            # Two units that each waited for room while they hold some would wait for ever.
            while not self._room.acquire(blocking=not under_way):
                yield take()
            under_way.append(send(place))
        while under_way:
            yield take()


class Pipelines:
    """How a pool starts and gives up replicas of several shards: a placement group and a leading actor each.

    Args:
        leader: the kind of pipeline.
        spec: how shards load the base and θ₀.
        config: shards and threads.
    """

    def __init__(self, leader: type[Pipeline], spec: ReplicaSpec, config: GradientsConfig, size: PoolSize) -> None:
        self._leader, self._spec, self._config = leader, spec, config
        self.bundles = [bundle_of(config, size)] * config.shards
        self.wait_s = 60.0 * config.wait_minutes
        self._groups: dict[Any, Any] = {}

    def start(self) -> Any:
        """See `pool.ActorKind`."""
        import ray
        from ray.util.placement_group import placement_group

        group = placement_group(self.bundles, strategy="PACK")
        # Two calls at once: the next unit enters the pipeline while the last batches of one are on their way back.
        remote = ray.remote(num_cpus=0, max_concurrency=2, max_restarts=0, max_task_retries=0)(self._leader)
        actor = remote.remote(self._spec, self._config, group, self.bundles[0].get("GPU", 0.0))
        self._groups[actor] = group
        return actor

    def stop(self, actor: Any) -> None:
        """See `pool.ActorKind`; the shards go with their placement group."""
        import ray
        from ray.util.placement_group import remove_placement_group

        ray.kill(actor)
        remove_placement_group(self._groups.pop(actor))


def map_pipelines(
    leader: type[Pipeline],
    method: str,
    units: Mapping[str, Unit],
    *,
    spec: ReplicaSpec,
    config: GradientsConfig,
    size: PoolSize,
    on_result: Callable[[str, Any], None],
) -> None:
    """`pool.map_units` on replicas of `config.shards` shards; raises what that raises."""
    # Two units at a time, so that one's last batches and the next one's first share the pipeline.
    map_units(Pipelines(leader, spec, config, size), method, units, size=size, on_result=on_result, in_flight=2)


class ShardActor(ShardHolder):
    """One shard of a replica that takes gradients; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, config: GradientsConfig, shard: int) -> None:
        super().__init__(spec, config, shard)
        from ray_ensemble.gradients.projection import Projection
        from ray_ensemble.gradients.shard import GradientShard

        projection = Projection(config.dim, config.seed, self.device, config.projection)
        self._shard = GradientShard(self.model, self.layers, projection)

    def forward(self, key: str, unit: GradientUnit, place: int, hidden: Wire | None) -> Wire:
        """Batch `place` of a unit forward through this shard."""
        batch = self.batch(unit.label_ids, unit.batches[place])
        return to_wire(self._shard.forward(key, batch, unit.kind, self.from_wire(hidden)))

    def backward(self, key: str, gradients: Wire) -> tuple[Wire | None, Share]:
        """A batch's gradients backward through this shard: gradients for the shard before, and its share."""
        back, features = self._shard.backward(key, self.from_wire(gradients))
        return None if back is None else to_wire(back), (to_wire(features), peak_memory_bytes())

    def turn(self, unit: GradientUnit, place: int, hidden: Wire) -> tuple[Wire, Wire, Share]:
        """Batch `place` of a unit through the last shard and back: gradients for the shard before, scores, its share."""
        batch = self.batch(unit.label_ids, unit.batches[place])
        turned = self._shard.turn(batch, unit.kind, self.from_wire(hidden))
        return to_wire(turned.gradients), to_wire(turned.scores), (to_wire(turned.features), peak_memory_bytes())


class ShardedReplica(Pipeline):
    """A replica that takes gradients."""

    shard_class = ShardActor

    def collect(self, unit: GradientUnit) -> UnitResult:
        """Features of a unit. Several calls may be under way at once; their batches share the pipeline.

        A unit that does not fit into memory is not tried in halved batches, as a whole replica does: others are under way.
        """
        import ray
        import torch

        reference = ray.put(unit)
        scores: list[Wire] = []
        features: list[Wire] = []
        peak = 0
        for score, *shares in self.streamed(len(unit.batches), lambda place: self._send(reference, place)):
            scores.append(score)
            # Shard by shard, so that the sum does not depend on which came first.
            features.append(np.add.reduce([share for share, _ in shares]))
            peak = max(peak, *(held for _, held in shares))
        tokens = sum(batch.tokens for batch in unit.made(0, torch.device("cpu")))
        counts = {"forward_tokens": tokens, "backward_tokens": tokens * unit.targets, "halved_batches": 0}
        return UnitResult.of(unit.kind, _collected(unit, scores, features), counts, peak)

    def _send(self, unit: Any, place: int) -> list[Any]:
        """Set a batch on its way; returns references to its scores and to each shard's share of its features."""
        *front, last = self.shards
        key = f"{unit.hex()}-{place}"
        hidden = None
        for shard in front:
            hidden = shard.forward.remote(key, unit, place, hidden)
        gradients, scores, share = last.turn.options(num_returns=3).remote(unit, place, hidden)
        shares = [share]
        for shard in reversed(front):
            gradients, share = shard.backward.options(num_returns=2).remote(key, gradients)
            shares.append(share)
        return [scores, *shares]


def _collected(unit: GradientUnit, scores: list[Wire], features: list[Wire]) -> Collected:
    import torch

    from ray_ensemble.models import margins

    s = torch.from_numpy(np.concatenate(scores))
    phi = torch.from_numpy(np.concatenate(features))
    labels = torch.tensor([example.label for batch in unit.batches for example in batch])
    if unit.kind == "classes":
        phi = phi.view(len(labels), unit.targets, -1)
        phi = torch.cat([torch.zeros_like(phi[:, :1]), phi], dim=1)  # (N, K, d), zero for the first class
    return Collected(s, margins(s, labels), phi)
