"""The folder of `classify10.py`: run folders, budgets, adapters, scores, and a record for every arm and seed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import JobConfig, flatten
from ray_ensemble.ensemble import ScoreRequest, score_all
from ray_ensemble.errors import InputError
from ray_ensemble.estimator.similarity import centred_cosines
from ray_ensemble.evaluation import ModelSize, training_flops
from ray_ensemble.evaluation.hidden_states import mean_hidden_states
from ray_ensemble.files import read_json, sha256_file, whole_folder, write_array, write_json
from ray_ensemble.grouping.baselines import Method, group_by_similarity, random_partitions
from ray_ensemble.run_folder import RunFolder, is_free, open_run
from ray_ensemble.stages import Stages
from ray_ensemble.training import AdapterJob, StartingPoint, TrainedAdapter, job_key, task_steps, train_adapters
from ray_ensemble.training.cache import finished

Scores = NDArray[Any]
Parts = dict[str, float]

# Folders of the job's run that a partition's run goes on from.
SHARED = ("init", "start", "gradients", "scores", "trained")


@dataclass(frozen=True)
class Work:
    """One adapter to train: the job, the run folder whose start and tasks it has, and the settings that it is trained with."""

    job: AdapterJob
    place: Stages
    config: JobConfig

    @property
    def setting(self) -> tuple[str, float]:
        """Works of one setting can be trained side by side."""
        return str(self.place.folder.path), self.config.training.learning_rate


@dataclass
class Result:
    """What one arm reached with one seed: scores (N, K) on every task's test split, and what they cost, evaluation left out."""

    scores: dict[str, Scores]
    steps: int = 0
    adapters: int = 0
    flops: Parts = field(default_factory=dict)
    seconds: Parts = field(default_factory=dict)
    peak_memory_bytes: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, flops: float, seconds: float, peak: int = 0) -> None:
        """Charge a part of the cost."""
        self.flops[part] = self.flops.get(part, 0.0) + flops
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)

    def charge(self, part: str, trained: Sequence[TrainedAdapter], size: ModelSize) -> None:
        """Charge trained adapters as `part`, and count them and their steps."""
        for each in trained:
            flops = training_flops(size, each.tokens, each.validation_tokens)
            self.add(part, flops, each.seconds, each.peak_memory_bytes)
            self.steps += each.steps
            self.adapters += 1

    def like(self, cost: Mapping[str, Any], without: Sequence[str] = ()) -> None:
        """Take over the cost that another arm's record tells, but for some parts."""
        for part, flops in cost["flops"].items():
            if part not in without:
                self.add(part, flops, cost["seconds"][part])
        self.steps, self.adapters, self.about = cost["steps"], cost["adapters"], cost["about"]
        self.peak_memory_bytes = cost["peak_memory_bytes"]


class Experiment:
    """The folder of a benchmark: a run folder of the job, one for each partition and seed, and a record for each arm and seed.

    Args:
        path: the folder.
        config: the job; `training.min_steps` is set to 0 in it.
        stack: closes Ray and the folder's lease.
        records: where records are, if not in `path`.
    """

    def __init__(self, path: Path, config: JobConfig, stack: ExitStack, records: Path | None = None) -> None:
        training = config.training.model_copy(update={"min_steps": 0})
        self.path = path
        self.records = records or path / "arms"
        self.config = config.model_copy(update={"training": training})
        self._stack = stack
        self.job = Stages(stack.enter_context(open_run(path / "job", self.config)), stack)
        self._places: dict[str, Stages] = {}
        self._groups: dict[tuple[str, int], list[list[str]]] = {}
        self._keys: dict[tuple[tuple[str, float], AdapterJob], str] = {}

    # Budgets -----------------------------------------------------------------------------------------------------------

    @cached_property
    def examples(self) -> list[int]:
        """Training examples of each task."""
        return [len(task["train"]) for task in self.job.encoded]

    @property
    def warm_up(self) -> int:
        """Steps of the common start; 0 at a fresh one."""
        return self.config.gradients.meta_steps if self.job.warm else 0

    @cached_property
    def shares(self) -> dict[str, int]:
        """Steps of each task after the common start."""
        return dict(zip(self.names, task_steps(self.examples, self.config.training), strict=True))

    @property
    def steps(self) -> int:
        """Steps of every arm of equal budget, common start included."""
        return self.warm_up + sum(self.shares.values())

    @cached_property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [task.name for task in self.job.encoded]

    # Run folders -------------------------------------------------------------------------------------------------------

    def place(self, name: str, seed: int, boosting: int = 0) -> Stages:
        """The run folder of one partition and seed; all up to the gradients, adapters and scores are those of the job's.

        Its search, and the draw of the affinity's subsets, have the job's seeds plus `seed`.
        """
        key = f"{name}-{seed}"
        if key not in self._places:
            changes = {
                "search": self.config.search.model_copy(update={"seed": self.config.search.seed + seed}),
                "estimator": self.config.estimator.model_copy(update={"seed": self.config.estimator.seed + seed}),
                "boosting": self.config.boosting.model_copy(update={"steps": boosting}),
            }
            folder = RunFolder(self.path / "partitions" / key, self.config.model_copy(update=changes))
            for shared in SHARED:
                (self.job.folder / shared).mkdir(exist_ok=True)
                if not (folder / shared).is_symlink():
                    (folder / shared).symlink_to(Path("../../job") / shared, target_is_directory=True)
            (folder / "manifests").mkdir(exist_ok=True)
            stages = ("plan", "tasks", "gradients")
            for file in ("plan.json", "tasks.json", *(f"manifests/{stage}.json" for stage in stages)):
                shutil.copy(self.job.folder / file, folder / file)
            self._places[key] = Stages(folder, self._stack)
            self._places[key].encoded = self.job.encoded
        return self._places[key]

    def wide(self, times: int) -> Stages:
        """A run folder, planned, with `times` the rank and a fresh start of its own.

        Alpha grows alike, so that alpha/rank stays; rank-stabilised adapters keep alpha, which is their rule for all ranks.
        """
        key = f"rank-{times * self.config.adapter.rank}"
        if key not in self._places:
            settings = self.config.adapter
            alpha = settings.alpha if settings.rank_stabilized else times * settings.alpha
            changes = {
                "adapter": settings.model_copy(update={"rank": times * settings.rank, "alpha": alpha}),
                "gradients": self.config.gradients.model_copy(update={"start": "fresh"}),
            }
            folder = RunFolder(self.path / key, self.config.model_copy(update=changes))
            stages = Stages(folder, self._stack)
            stages.encoded = self.job.encoded
            stages.through("plan")
            self._places[key] = stages
        return self._places[key]

    def found(self, seed: int) -> dict[str, Any]:
        """`partition.json` of the search with this seed."""
        partition: dict[str, Any] = read_json(self.place("found", seed).folder / "partition.json", "partition")
        return partition

    @property
    def hand_file(self) -> Path:
        """Groups of the user's own, if there are any; beside the records, which are of them."""
        return self.records / "by_hand.json"

    def keep_by_hand(self, groups: Any, source: Path) -> None:
        """Take groups of the user's own, for good.

        Raises:
            InputError: they are no partition of the tasks, or not those that the folder has.
        """
        if not (isinstance(groups, list) and groups and all(isinstance(g, list) and g for g in groups)):
            raise InputError(f'{source}: groups are a list of lists of dataset names, as [["a", "b"], ["c"]]')
        named = [task for group in groups for task in group]
        for task in named:
            if task not in self.names:
                raise InputError(f"{source}: no dataset is called {task!r}; there are {', '.join(self.names)}")
            if named.count(task) > 1:
                raise InputError(f"{source}: {task} is in two groups or twice in one")
        if missing := [name for name in self.names if name not in named]:
            raise InputError(f"{source}: in no group: {', '.join(missing)}")
        ordered = sorted(
            (sorted(group, key=self.names.index) for group in groups), key=lambda g: self.names.index(g[0])
        )
        if not self.hand_file.exists():
            write_json(self.hand_file, ordered)
        elif read_json(self.hand_file) != ordered:
            raise InputError(f"{source}: {self.hand_file} has other groups; take another --output")

    def groups(self, kind: str, seed: int) -> list[list[str]]:
        """The groups of a kind of partition, as names of tasks: `found`, `alone`, `by_hand`, and as many as were found `random`
        or by `hidden_states`.
        """
        if (kind, seed) not in self._groups:
            self._groups[kind, seed] = self._grouped(kind, seed)
        return self._groups[kind, seed]

    def _grouped(self, kind: str, seed: int) -> list[list[str]]:
        if kind == "alone":
            return [[name] for name in self.names]
        if kind == "by_hand":
            chosen: list[list[str]] = read_json(self.hand_file, "groups by hand")
            return chosen
        found = self.found(seed)
        groups: list[list[str]] = found["groups"]
        if kind == "found":
            return groups
        n, m, number = len(self.names), len(groups), self.config.search.seed + seed
        if kind == "random":
            (partition,) = random_partitions(n, m, 1, number)
        else:
            method: Method = "spectral" if found["method"] == "spectral" else "sdp"
            partition = group_by_similarity(centred_cosines(self.hidden_states()), m, method, number)
        return [[self.names[task] for task in group] for group in partition]

    @property
    def states_file(self) -> Path:
        """Says what the hidden states cost."""
        return self.path / "hidden_states.json"

    def compute_hidden_states(self) -> None:
        """Mean hidden states of all tasks, and what they cost."""
        self.job.need_ray()
        started = time.monotonic()
        self.hidden_states()
        tokens = sum(len(example.prompt_ids) for task in self.job.encoded for example in task["train"])
        write_json(self.states_file, {"seconds": round(time.monotonic() - started, 3), "tokens": tokens})

    def hidden_states(self) -> NDArray[np.float64]:
        """(n, H), from files where they are."""
        job = self.job
        return mean_hidden_states(job.encoded, job.spec, job.config.gradients, job.base_hashes, job.folder.path)

    # Training and scoring ----------------------------------------------------------------------------------------------

    def work(
        self, name: str, members: Sequence[str], steps: int, seed: int, rate: float = 1.0, fresh: bool = False
    ) -> Work:
        """An adapter trained with the job's seed plus `seed`, from the start of all groups or, if `fresh`, from θ₀ as drawn."""
        settings = self.config.training
        start = None
        if fresh and self.job.warm:
            name = f"{name} (fresh)"
            start = StartingPoint(self.job.init, self.job.planned["adapter"]["hash"])
        config = self.config
        if rate != 1.0:
            training = settings.model_copy(update={"learning_rate": rate * settings.learning_rate})
            config = config.model_copy(update={"training": training})
        job = AdapterJob(f"{name}, seed {seed}", tuple(members), steps, settings.seed + seed, start)
        return Work(job, self.job, config)

    def trained(self, work: Work) -> TrainedAdapter | None:
        """The adapter, if it is there."""
        where = (work.setting, work.job)
        if where not in self._keys:
            base = work.place.base_hashes
            self._keys[where] = job_key(work.job, work.place.encoded, work.config, base)
        return finished(self.job.folder.path, self._keys[where])

    def train(self, works: Sequence[Work]) -> None:
        """Train what is not there; those of one setting side by side. All adapters are kept in the job's run folder."""
        self.job.need_ray()
        for setting in dict.fromkeys(work.setting for work in works):
            chosen = [work for work in works if work.setting == setting]
            place, config = chosen[0].place, chosen[0].config
            jobs = [work.job for work in chosen]
            spec, base = asdict(place.spec), place.base_hashes
            train_adapters(jobs, place.encoded, config, self.job.folder.path, spec, base)

    def adapters(self, works: Sequence[Work]) -> list[TrainedAdapter]:
        """Adapters that are there."""
        found = [self.trained(work) for work in works]
        missing = [work.job.name for work, each in zip(works, found, strict=True) if each is None]
        if missing:
            raise ValueError(f"not trained: {', '.join(missing)}")
        return [each for each in found if each is not None]

    def score(
        self,
        folders: Mapping[tuple[str, str], Path | None],
        place: Stages,
        split: Literal["test", "validation", "held out"] = "test",
    ) -> tuple[dict[tuple[str, str], Scores], int]:
        """Scores (N, K) of adapters, by (task, name), and tokens; None stands for the base.

        Held out are the validation examples that the search does not see.
        """
        place.need_ray()
        requests = []
        for (task, _), adapter in folders.items():
            encoded = place.task(task)
            examples = place.held_out(task) if split == "held out" else encoded[split]
            requests.append(ScoreRequest(adapter, encoded, examples))
        scored = score_all(
            requests, place.spec, place.config.gradients, place.base_hashes, self.job.folder.path, f"{split} scores"
        )
        return dict(zip(folders, scored.scores, strict=True)), scored.tokens

    def score_one(self, adapter: Path | None, place: Stages) -> dict[str, Scores]:
        """Test scores of one adapter on all tasks."""
        found, _ = self.score({(task, ""): adapter for task in self.names}, place)
        return {task: scores for (task, _), scores in found.items()}

    def charge_start(self, result: Result) -> None:
        """Charge the common start, if there is one, to an arm that begins there without having taken gradients."""
        if self.job.warm:
            start = self.start_adapter()
            flops = training_flops(self.job.size(), start.tokens, start.validation_tokens)
            result.add("start", flops, start.seconds, start.peak_memory_bytes)
            result.steps += start.steps

    def start_adapter(self) -> TrainedAdapter:
        """The common start as it was trained."""
        wanted = sha256_file(self.job.start / "adapter_model.safetensors")
        for record in sorted((self.job.folder / "trained").glob("*/result.json")):
            if read_json(record)["files"]["adapter_model.safetensors"] == wanted:
                found = finished(self.job.folder.path, record.parent.name)
                if found is not None:
                    return found
        raise ValueError(f"{self.job.folder / 'trained'}: the common start is not there")

    # Records -----------------------------------------------------------------------------------------------------------

    def claim_records(self) -> None:
        """See to it that the records are of this job, model and data; paths may differ, so that they can come from elsewhere.

        Raises:
            InputError: they are of others.
        """
        self.job.through("tasks")
        about = {
            # Model and data are told by their contents.
            "config": {
                key: value
                for key, value in flatten(self.config).items()
                if not is_free(key) and key != "model.source" and not key.startswith("tasks.")
            },
            "model": self.job.planned["model"]["hash"],
            "tasks": [[task.name, task.data_hash] for task in self.job.encoded],
        }
        file = self.records / "job.json"
        if not file.exists():
            write_json(file, about)
        elif (kept := read_json(file, "job of the records")) != about:
            before, after = kept.get("config", {}) | kept, about["config"] | about
            changed = [
                f"{key}: {before.get(key)} -> {after.get(key)}" if key in about["config"] else key
                for key in dict.fromkeys([*before, *after])
                if key != "config" and before.get(key) != after.get(key)
            ]
            raise InputError(f"{self.records}: records of another job ({', '.join(changed)}); choose another --records")

    def record(self, arm: str, seed: int) -> Path:
        """The folder of an arm's result; whole or absent."""
        return self.records / arm / f"seed-{seed}"

    def keep(self, arm: str, seed: int, result: Result) -> None:
        """Write a result; scores in single precision, which no figure's digits that are shown can tell."""
        about = {key: value for key, value in asdict(result).items() if key != "scores"}
        with whole_folder(self.record(arm, seed)) as temporary:
            for task, scores in result.scores.items():
                write_array(temporary / f"{task}.npy", scores.astype(np.float32))
            write_json(temporary / "cost.json", about)

    def cost(self, arm: str, seed: int) -> dict[str, Any]:
        """What a kept result cost."""
        found: dict[str, Any] = read_json(self.record(arm, seed) / "cost.json", "record of an arm")
        return found

    def scores(self, arm: str, seed: int) -> list[Scores]:
        """Test scores (N, K) of a kept result, a task each.

        Raises:
            InputError: a file is missing, damaged, or of other examples.
        """
        folder, found = self.record(arm, seed), []
        for task in self.job.encoded:
            file = folder / f"{task.name}.npy"
            try:
                scores = np.load(file, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise InputError(f"{file}: cannot be read ({error}); delete {folder} to have it made again") from None
            expected = (len(task["test"]), len(task.labels))
            if scores.shape != expected:
                raise InputError(f"{file}: scores {scores.shape}, but {task.name} has {expected}; delete {folder}")
            found.append(scores)
        return found
