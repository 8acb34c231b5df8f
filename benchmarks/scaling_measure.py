"""What the stages of a run cost beside the model's own arithmetic, measured with the package's own code on this machine.

Each part is a function without arguments that returns plain figures; `scaling.py` runs those that its file does not have yet.
Seconds of this process are CPU seconds of its main thread where it only works (another process on the machine does not count),
and wall seconds where it waits for a disk or for Ray. Per-unit and per-MB figures are least squares over several sizes.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scaling_actors import Echo, Idle

from ray_ensemble.config import AdapterConfig, GradientsConfig, JobConfig, TrainingConfig
from ray_ensemble.ensemble import ScoreRequest, learn_weights, merge_adapters, score_all
from ray_ensemble.ensemble.scoring import score_paths
from ray_ensemble.estimator import Estimator, choose_regularization
from ray_ensemble.estimator.affinity import affinity, gradient_similarity, job_subsets
from ray_ensemble.estimator.planted import planted_tasks
from ray_ensemble.evaluation import summarise
from ray_ensemble.files import sha256_file, sha256_json, write_array
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.gradients.replicas import GradientReplica
from ray_ensemble.gradients.units import COUNTS, SplitPlan, UnitResult, part_is_whole
from ray_ensemble.grouping.cases import run_case
from ray_ensemble.pool import PlainActors, PoolSize, map_units
from ray_ensemble.runtime import cluster_cpus
from ray_ensemble.tasks import EncodedExample, EncodedTask, Split, split_hash

MB = 2**20
DIM, WIDTH = 400, 100  # d, and tokens of a prompt
PROVENANCE = {"model": "none", "quantization": "none", "adapter": "none"}


def encoded(name: str, train: int = 64, validation: int = 64, width: int = WIDTH, vocabulary: int = 500) -> EncodedTask:
    """A task of random tokens with two label words."""
    draw = np.random.default_rng(abs(hash(name)) % 2**32)

    def split(count: int) -> tuple[EncodedExample, ...]:
        rows = draw.integers(3, vocabulary, size=(count, width)).tolist()
        return tuple(EncodedExample(tuple(row), place % 2, False) for place, row in enumerate(rows))

    splits: dict[Split, tuple[EncodedExample, ...]] = {"train": split(train), "validation": split(validation)}
    splits["test"] = splits["validation"]
    return EncodedTask(name, ("no", "yes"), ((1,), (2,)), splits, "none")


@contextmanager
def small_base(hidden: int = 64, layers: int = 2) -> Iterator[ReplicaSpec]:
    """A random Llama on disk with a drawn adapter: what a worker loads, with next to no weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ray_ensemble.models import default_device, draw_initial_adapter, load_base

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=512, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(Path(folder, "base"))
        base = load_base(Path(folder, "base"), "none", default_device())
        draw_initial_adapter(base, AdapterConfig(), Path(folder, "init"))
        yield ReplicaSpec(str(Path(folder, "base")), "none", str(Path(folder, "init")), 0)


def line(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Least squares of seconds = fixed + slope · size, neither below zero."""
    fixed, slope = slopes([[1.0, size] for size in sizes], seconds)
    return {"fixed": fixed, "slope": slope}


def slopes(counts: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Least squares of seconds = Σ slope · count, no slope below zero; relative errors count."""
    from scipy.optimize import nnls

    weights = 1.0 / np.asarray(seconds, float)
    found, _ = nnls(np.asarray(counts, float) * weights[:, None], np.ones(len(weights)))
    return [float(slope) for slope in found]


def least(times: int, call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of several calls, in seconds of a clock."""
    taken = []
    for _ in range(times):
        started = clock()
        call()
        taken.append(clock() - started)
    return min(taken)


def pool() -> dict[str, Any]:
    """Seconds of this process that a unit of the pool takes, without and with its result kept as a file."""
    import ray

    rows, count = (32, 320, 1280), 80
    handed, kept, sizes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for size in rows:
            units = {f"unit-{size}-{i}": size for i in range(count)}
            results: list[dict[str, Any]] = []
            actors = PlainActors(Echo, (DIM,), GradientsConfig(), PoolSize(1, 1))
            started = time.thread_time()
            map_units(actors, "work", units, size=PoolSize(1, 1), on_result=partial(_first, results))
            handed.append((time.thread_time() - started) / count)
            path = Path(folder, "part.npz")
            kept.append(least(30, partial(UnitResult(results[0], dict.fromkeys(COUNTS, 1), 0).save, path)))
            sizes.append(size * DIM * 4 / MB)
    idle = ray.remote(num_cpus=0, max_concurrency=300)(Idle).remote()
    waits = {}
    for actors_held in (1, 16, 64, 256):
        references = [idle.wait.remote(30.0) for _ in range(actors_held)]
        ray.wait(references, timeout=0.2)
        waits[str(actors_held)] = least(20, partial(ray.wait, references, timeout=0))
    ray.kill(idle)
    return {
        "handed_out_and_taken": line(sizes, handed),
        "saved": line(sizes, kept),
        "one_wait_among": waits,
        "seen": {"MB": sizes, "handed_out_and_taken": handed, "saved": kept},
    }


def _first(results: list[dict[str, Any]], _: str, result: dict[str, Any]) -> None:
    if not results:
        results.append(result)


def actor_start() -> dict[str, Any]:
    """Seconds from asking for a replica of a base without weights until it is ready."""
    import ray

    with small_base() as spec:
        taken = []
        for _ in range(2):
            actors = PlainActors(GradientReplica, (spec, GradientsConfig(dim=8)), GradientsConfig(), PoolSize(1, 1))
            started = time.perf_counter()
            actor = actors.start()
            ray.get(actor.__ray_call__.remote(lambda _: None))
            taken.append(time.perf_counter() - started)
            actors.stop(actor)
    return {"seconds": min(taken), "seen": taken}


def train_job() -> dict[str, Any]:
    """Seconds of a Ray Train job of one step on a base without weights; the second one finds Ray's workers warm."""
    from ray_ensemble.training import AdapterJob, train_adapters

    config = JobConfig.model_validate({"model": {"source": "none"}, "tasks": ["none"]})
    config = config.model_copy(update={"training": TrainingConfig(concurrency=1, checkpoint_every=10**6)})
    tasks, taken = [encoded("a"), encoded("b")], []
    with small_base() as spec, tempfile.TemporaryDirectory() as folder:
        for seed in range(2):
            job = AdapterJob(f"job-{seed}", ("a", "b"), 1, seed)
            started = time.perf_counter()
            train_adapters([job], tasks, config, Path(folder), asdict(spec), PROVENANCE)
            taken.append(time.perf_counter() - started)
    return {"seconds": min(taken), "seen": taken}


def baseline() -> dict[str, Any]:
    """Seconds of a step of the one job that is left when all groups are trained, in turns: one worker, and `workers: auto`."""
    from ray_ensemble.training import AdapterJob, train_adapters

    tasks, steps = [encoded("a"), encoded("b")], 8
    ways: dict[str, Literal["auto"] | int] = {"one worker": 1, "auto": "auto"}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    with small_base(hidden=384, layers=6) as spec, tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            for way, workers in ways.items():
                training = TrainingConfig(workers=workers, checkpoint_every=10**6)
                config = JobConfig.model_validate(
                    {"model": {"source": "none"}, "tasks": ["none"], "training": training}
                )
                job, run = AdapterJob("qlora_all", ("a", "b"), steps, turn), Path(folder, f"{way}-{turn}")
                done = train_adapters([job], tasks, config, run, asdict(spec), PROVENANCE)["qlora_all"]
                rows = [json.loads(row)["seconds"] for row in (done.folder / "train.jsonl").read_text().splitlines()]
                taken[way].append(statistics.median(rows[1:]))
    return {"seconds_a_step": taken, "workers": {"one worker": 1, "auto": cluster_cpus()}}


def tune_trial() -> dict[str, Any]:
    """Seconds that Ray Tune adds to a trial, and to the search as a whole."""
    import pandas

    from ray_ensemble.grouping import run_search

    features, _ = planted_tasks(6, 2, train=24, validation=24, dim=16)
    walls, counts = [], (4, 24)
    for trials in counts:
        search = {"groups": [2, 3], "trials": trials}
        job = JobConfig.model_validate({"model": {"source": "none"}, "tasks": ["none"], "search": search})
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run_search(features, job, Path(folder), concurrency=1)
            wall = time.perf_counter() - started
            walls.append(wall - float(pandas.read_csv(Path(folder, "search", "trials.csv"))["seconds"].sum()))
    return {**line(counts, walls), "seen": dict(zip(map(str, counts), walls, strict=True))}


def fits() -> dict[str, Any]:
    """CPU seconds of the search's parts with the number of tasks n: λ, affinity, and one trial."""
    found: dict[str, Any] = {"n": [], "regularization": [], "affinity": [], "trial": []}
    for n in (8, 16, 32):
        job = JobConfig.model_validate({"model": {"source": "none"}, "tasks": ["none"]})
        features, _ = planted_tasks(n, 5, train=160, validation=80, dim=DIM)
        subsets = job_subsets(features, job.estimator)
        gc.collect()
        started = time.thread_time()
        value = choose_regularization(features, job.training, subsets, 0).value
        chosen = time.thread_time()
        estimator = Estimator(features, job.training, value)
        nearness = gradient_similarity(features) if n > 50 else None
        similarity = affinity(estimator, subsets, "loss", 0, nearness).symmetric()
        sampled = time.thread_time()
        run_case({"m": 5, "method": "spectral", "seed": 0, "repeat": 0}, estimator, similarity, job.search)
        ended = time.thread_time()
        for key, seconds in zip(
            ("n", "regularization", "affinity", "trial"),
            (n, chosen - started, sampled - chosen, ended - sampled),
            strict=True,
        ):
            found[key].append(seconds)
        print(
            f"  n = {n}: λ {chosen - started:.1f} s, affinity {sampled - chosen:.1f} s, a trial {ended - sampled:.1f} s",
            flush=True,
        )
    return found


def adapter_file(folder: Path, megabytes: float, rank: int = 4) -> Path:
    """A PEFT adapter of one module and about this size."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    width = max(1, int(megabytes * MB / 4 / (2 * rank)))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(rank, width), f"{name}.lora_B.weight": torch.ones(width, rank)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def requests() -> dict[str, Any]:
    """CPU seconds that label-score requests take of this process when all scores are there: keys, checks, reading.

    In turns, as it is and as it was (`before`): every request hashed its adapter and its examples itself. Fitted to what they
    grow with: requests, tasks, and MB of adapters; before, requests and requests × MB.
    """
    config, spec = GradientsConfig(), ReplicaSpec("none", "none", "none", 0)
    shapes, now, before = [(4, 3, 0.25), (12, 3, 0.25), (4, 9, 0.25), (6, 4, 2.0), (8, 8, 1.0)], [], []
    for tasks, adapters, size in shapes:
        examples = [encoded(f"task-{i}", 2, 40) for i in range(tasks)]
        with tempfile.TemporaryDirectory() as folder:
            held = [adapter_file(Path(folder, f"group-{g}"), size) for g in range(adapters)]
            wanted = [ScoreRequest(a, task, task["validation"]) for task in examples for a in held]
            paths = score_paths(wanted, config, PROVENANCE, Path(folder))
            for path in paths:
                write_array(path, np.zeros((40, 2), np.float32))
            calls: list[Callable[[], object]] = [
                partial(score_all, wanted, spec, config, PROVENANCE, Path(folder), ""),
                partial(score_paths, wanted, config, PROVENANCE, Path(folder)),
                partial(keys_one_by_one, wanted, config),
            ]
            turns = [[least(1, call, time.thread_time) for call in calls] for _ in range(3)]
            each, keys, slow_keys = (min(turn[place] for turn in turns) for place in range(3))
            now.append(each)
            before.append(each - keys + slow_keys)
    grown = [[t * a, t, a * size] for t, a, size in shapes]
    fitted, were = slopes(grown, now), slopes([[t * a, t * a * size] for t, a, size in shapes], before)
    return {
        "request": fitted[0], "task": fitted[1], "adapter_MB": fitted[2],
        "before": {"request": were[0], "request_MB": were[1]},
        "seen": {"tasks, adapters, MB": shapes, "seconds": now, "seconds_before": before},
    }  # fmt: skip


def keys_one_by_one(wanted: Sequence[ScoreRequest], config: GradientsConfig) -> list[str]:
    """Keys of scores as they were made: all hashes for every request."""
    keys = []
    for request in wanted:
        adapter = None if request.adapter is None else sha256_file(Path(request.adapter) / "adapter_model.safetensors")
        data = split_hash(request.task, request.examples)
        how = {"batch": config.batch_tokens, "threads": config.threads}
        keys.append(sha256_json({"adapter": adapter, "data": data, "base": PROVENANCE, **how})[:16])
    return keys


def store() -> dict[str, Any]:
    """Seconds around the units of the gradient pass: planning an example, checking and putting together a unit, hashing a MB."""
    task = encoded("films", 640, 2)
    config = GradientsConfig(dim=DIM)
    plan = SplitPlan(task, "train", config, PROVENANCE)
    planning = least(3, lambda: SplitPlan(task, "train", config, PROVENANCE), time.thread_time) / plan.examples
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder, "parts")
        for name, unit in plan.units.items():
            rows = len(unit.indices)
            arrays = {"margins": np.ones(rows, np.float32), "features": np.ones((rows, DIM), np.float32)}
            UnitResult(arrays, dict.fromkeys(COUNTS, 1), 0).save(parts / f"{name}.npz")
        checking = least(3, lambda: [part_is_whole(parts / f"{name}.npz") for name in plan.units]) / len(plan.units)
        together = least(3, lambda: plan.assemble(parts, Path(folder, "store"))) / len(plan.units)
        large = Path(folder, "large")
        large.write_bytes(bytes(64 * MB))
        hashing = least(3, lambda: sha256_file(large)) / 64
    return {
        "planned_example": planning, "unit_examples": plan.examples / len(plan.units),
        "checked_unit": checking, "assembled_unit": together, "hashed_MB": hashing,
    }  # fmt: skip


def weights() -> dict[str, Any]:
    """CPU seconds that the weights of a dataset take with the number of adapters m; 40 validation examples, two labels."""
    draw, counts, seconds = np.random.default_rng(0), (2, 5, 10, 20), []
    for m in counts:
        scores = [draw.normal(size=(m, 40, 2)).astype(np.float32) for _ in range(4)]
        labels = [draw.integers(0, 2, 40) for _ in scores]
        priors = [np.eye(m)[0] for _ in scores]
        seconds.append(least(2, partial(learn_weights, scores, labels, priors), time.thread_time) / 4)
    return {"m": list(counts), "seconds": seconds}


def merging() -> dict[str, Any]:
    """Seconds that merging takes for each MB of the adapters that go in."""
    sizes, seconds = [], []
    for parts, size in ((2, 0.5), (5, 1.0), (10, 2.0)):
        with tempfile.TemporaryDirectory() as folder:
            held = [adapter_file(Path(folder, f"group-{g}"), size) for g in range(parts)]
            shares, target = [1.0 / parts] * parts, Path(folder, "merged")
            seconds.append(least(5, partial(merge_adapters, held, shares, target)))
            sizes.append(parts * size)
    return {**line(sizes, seconds), "seen": {"MB": sizes, "seconds": seconds}}


def evaluation() -> dict[str, Any]:
    """CPU seconds that the figures of a dataset take: five arms, 120 test examples, bootstraps."""
    draw, counts, seconds = np.random.default_rng(0), (5, 20), []
    arms = ("base", "qlora_all", "group", "ensemble", "merged")
    for count in counts:
        names = [f"task-{i}" for i in range(count)]
        outputs = {name: {arm: draw.normal(size=(120, 2)) for arm in arms} for name in names}
        labels = {name: draw.integers(0, 2, 120) for name in names}
        seconds.append(least(2, partial(summarise, outputs, labels), time.thread_time))
    return {**line(counts, seconds), "seen": dict(zip(map(str, counts), seconds, strict=True))}


def speed() -> dict[str, Any]:
    """How many times the forward pass the gradient pass is, on a random base of 12 M parameters, by seconds a token."""
    from ray_ensemble.ensemble.scoring import ScoringReplica

    task = encoded("films", 64, 64)
    with small_base(hidden=384, layers=6) as spec:
        config = GradientsConfig(dim=DIM)
        scoring, replica = ScoringReplica(spec, 1, config.batch_tokens), GradientReplica(spec, config)
        units = list(SplitPlan(task, "train", config, PROVENANCE).units.values())
        request = ScoreRequest(None, task, task["train"])
        turns = [
            (least(1, lambda: scoring.score(request)), least(1, lambda: [replica.collect(unit) for unit in units]))
            for _ in range(4)
        ]
    forward, gradient = (statistics.median(each) for each in zip(*turns[1:], strict=True))
    return {"gradient_over_forward": gradient / forward, "forward_tokens_per_second": 64 * (WIDTH + 2) / forward}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "store": store, "requests": requests, "merging": merging, "weights": weights, "evaluation": evaluation, "speed": speed,
    "fits": fits, "pool": pool, "actor_start": actor_start, "train_job": train_job, "tune_trial": tune_trial,
    "baseline": baseline,
}  # fmt: skip
NEED_RAY = ("pool", "actor_start", "train_job", "tune_trial", "baseline")
NOT_IN_THE_MODEL = {"baseline"}
