"""What each stage of a run does: it reads what the ones before it wrote, and returns its files and what it cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ensemble.adapter_stages import ensemble, evaluate, train
from ray_ensemble.config import JobConfig
from ray_ensemble.errors import InputError
from ray_ensemble.files import read_json, sha256_file, sha256_json, write_json
from ray_ensemble.job_metadata import metadata
from ray_ensemble.metrics import FAILED, RUNNING, WAITING, WHOLE, run_figures
from ray_ensemble.progress import Bar, console
from ray_ensemble.run_folder import STAGES, RunFolder
from ray_ensemble.runtime import ray_session
from ray_ensemble.storage import located
from ray_ensemble.tasks import SPLITS, EncodedExample, EncodedTask, Task, bare_prompt, encode_task, load_tasks
from ray_ensemble.version import __version__

if TYPE_CHECKING:
    from ray_ensemble.estimator import Estimator, TaskFeatures
    from ray_ensemble.evaluation import ModelSize
    from ray_ensemble.gradients import GradientStore

Facts = dict[str, Any]
Outcome = tuple[list[Path], Facts]


class Stages:
    """One pass through the stages of a folder; Ray starts when the first stage that needs it has to run."""

    def __init__(self, folder: RunFolder, stack: ExitStack) -> None:
        self.folder = folder
        self.config = folder.config
        self._stack = stack
        self._ray = False

    def through(self, last: str) -> None:
        """Run what is not whole, in order, up to `last`."""
        steps: dict[str, Callable[[], Outcome]] = {
            "plan": self.plan,
            "tasks": self.tasks,
            "gradients": self.gradients,
            "search": self.search,
            "train": lambda: train(self),
            "ensemble": lambda: ensemble(self),
            "evaluate": lambda: evaluate(self),
            "report": self.report,
        }
        wanted = STAGES[: STAGES.index(last) + 1]
        with run_figures(self.folder.name.rpartition("/")[2]) as figures:
            for stage in wanted:
                figures.stage(stage, WAITING)
            for stage in wanted:
                if self.folder.whole(stage):
                    if stage == "tasks":
                        self.refuse_changed_data()
                    console.print(f"[dim]{stage}: done before[/dim]")
                    figures.stage(stage, WHOLE)
                    continue
                self.folder.forget_from(stage)
                console.print(f"[bold]{stage}[/bold]")
                figures.stage(stage, RUNNING)
                started = time.monotonic()
                try:
                    files, facts = steps[stage]()
                except BaseException:
                    figures.stage(stage, FAILED)
                    raise
                seconds = round(time.monotonic() - started, 3)
                self.folder.finish(stage, files, {"seconds": seconds, **facts})
                figures.stage(stage, WHOLE, seconds)

    # The stages -----------------------------------------------------------------------------------------------------

    def plan(self) -> Outcome:
        """Find the model, draw θ₀, and say what will be done."""
        from ray_ensemble.models import (
            LabelTree,
            backbone_parameters,
            check_scores,
            check_shards,
            default_device,
            draw_initial_adapter,
            load_base,
            load_miniature,
            load_shapes,
            model_hash,
            resolve_quantization,
        )
        from ray_ensemble.training.parallel import check_strategy

        check_strategy(self.config.training)
        self._check_settings()
        shards = self.config.gradients.shards
        if shards > 1:  # then no one process need have room for it
            base, tried = load_shapes(self._model_folder, default_device()), load_miniature(self._model_folder)
        else:
            base = tried = load_base(self._model_folder, "none", default_device())
        trees = {task.name: LabelTree.of(task.label_ids) for task in self.encoded}
        width = max(len(e.prompt_ids) + len(trees[t.name].tokens) for t in self.encoded for s in SPLITS for e in t[s])
        check_scores(tried, any(tree.branches for tree in trees.values()), width)
        if shards > 1:
            check_shards(tried, shards)
        draw_initial_adapter(base, self.config.adapter, self.init)
        import torch
        from safetensors import safe_open

        pad = self._tokenizer.pad_token_id
        sizes = {"lora_A": 0, "lora_B": 0}
        with safe_open(self.init / "adapter_model.safetensors", "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                sizes["lora_A" if "lora_A" in name else "lora_B"] += torch.Size(
                    tensors.get_slice(name).get_shape()
                ).numel()
        plan = {
            "version": __version__,
            "model": {
                "source": self.config.model.source,
                "hash": model_hash(self._model_folder),
                "quantization": resolve_quantization(self.config.model, default_device()),
                "backbone_parameters": backbone_parameters(base),
                "device": default_device().type,
                "pad_id": pad if pad is not None else self._tokenizer.eos_token_id or 0,
            },
            "adapter": {"hash": self._initial_hash(), "parameters": sizes},
        }
        write_json(self.folder / "plan.json", plan)
        return [self.folder / "plan.json", *sorted(self.init.iterdir())], {}

    def tasks(self) -> Outcome:
        """Read, split and tokenise the data."""
        self._check_settings()
        described = [_describe(task, encoded) for task, encoded in zip(self._loaded, self.encoded, strict=True)]
        write_json(self.folder / "tasks.json", {"tasks": described})
        return [self.folder / "tasks.json"], {}

    def gradients(self) -> Outcome:
        """Projected per-example gradients of every task."""
        from ray_ensemble.gradients import collect_gradients

        self.need_ray()
        warm_up, warm_up_files = self._warm_up() if self.warm else (0.0, [])
        store = self.folder / "gradients"
        done = collect_gradients(self.encoded, self.spec, self.config.gradients, self.base_hashes, store)
        flops = self.gradient_pass_flops(done.forward_tokens, done.backward_tokens, done.projected)
        files = [*warm_up_files, *sorted(p for p in store.rglob("*") if p.is_file())]
        return files, {"flops": warm_up + flops, "peak_memory_bytes": done.peak_memory_bytes, "examples": done.examples}

    def gradient_pass_flops(self, forward_tokens: int, backward_tokens: int, projected: int) -> float:
        """Operations of a gradient pass at this run's start, with its projection (`evaluation.gradient_flops`)."""
        from ray_ensemble.evaluation import gradient_flops
        from ray_ensemble.gradients.projection import signs_per_element

        # At a fresh start only B's half of the adapter has a gradient to take and to project.
        size = self.size(half=None if self.warm else "lora_B")
        settings = self.config.gradients
        signs = signs_per_element(settings.projection, settings.dim, self.config.adapter.rank)
        return gradient_flops(size, forward_tokens, backward_tokens, projected, signs)

    def _warm_up(self) -> tuple[float, list[Path]]:
        """Train the common starting point on all tasks (GradEx, section 3); its operations and its files."""
        from ray_ensemble.evaluation import training_flops
        from ray_ensemble.training import AdapterJob, train_adapters

        job = AdapterJob(
            "start",
            tuple(task.name for task in self.encoded),
            self.config.gradients.meta_steps,
            self.config.training.seed,
        )
        hashes = self._hashes(self.planned["adapter"]["hash"])
        spec = asdict(self._spec_at(self.init))
        trained = train_adapters([job], self.encoded, self.config, self.folder.path, spec, hashes)["start"]
        shutil.rmtree(self.start, ignore_errors=True)
        shutil.copytree(trained.folder, self.start)
        return training_flops(self.size(), trained.tokens, trained.validation_tokens), sorted(self.start.iterdir())

    def search(self) -> Outcome:
        """Affinity of the tasks and the best partition found."""
        from ray_ensemble.evaluation import training_flops
        from ray_ensemble.grouping import run_search
        from ray_ensemble.real_runs import calibration_truths
        from ray_ensemble.report import write_search_plot

        self.need_ray()
        features = self.features()
        truths, trained = calibration_truths(self, features)
        with Bar("search", self.config.search.trials, "trials") as bar:
            found = run_search(features, self.config, self.folder.path, progress=bar.reach, truths=truths)
        for group in found.groups:
            console.print(f"  group: {', '.join(group)}", markup=False)
        # Not among the stage's files: the report draws all plots anew.
        write_search_plot(self.folder.path)
        files = [self.folder / "affinity.json", self.folder / "partition.json", self.folder / "search" / "trials.csv"]
        flops = found.flops + sum(training_flops(self.size(), run.tokens, run.validation_tokens) for run in trained)
        return files, {"flops": flops, "peak_memory_bytes": found.peak_memory_bytes, "fits": found.fits}

    def report(self) -> Outcome:
        """One HTML file and its plots."""
        from ray_ensemble.report import write_report

        write_report(self.folder.path)
        return [self.folder / "report.html", *sorted((self.folder / "plots").glob("*.png"))], {}

    def features(self) -> list[TaskFeatures]:
        """The gradients of this folder as the estimator takes them."""
        from ray_ensemble.gradients import GradientStore

        told = read_json(self.folder / "tasks.json", "list of tasks")["tasks"]
        trained = {task["name"]: int(task["train"]) for task in told}
        return _features(GradientStore.open(self.folder / "gradients"), trained)

    def estimator(self) -> Estimator:
        """The estimate as the search uses it, from the gradients of this folder."""
        from ray_ensemble.grouping import job_estimator
        from ray_ensemble.real_runs import calibration_truths

        features = self.features()
        return job_estimator(features, self.config, calibration_truths(self, features)[0])

    # What the stages share --------------------------------------------------------------------------------------------

    def need_ray(self) -> None:
        """Start Ray unless this pass has."""
        if not self._ray:
            about = metadata(self.folder.name, self.config.model.source, str(len(self.encoded)))
            self._stack.enter_context(ray_session(about))
            self._ray = True

    @cached_property
    def _model_folder(self) -> Path:
        from ray_ensemble.models import materialise

        return materialise(self.config.model.source)

    @cached_property
    def _tokenizer(self) -> Any:
        from ray_ensemble.models import load_tokenizer

        return load_tokenizer(self._model_folder)

    @cached_property
    def _loaded(self) -> list[Task]:
        return load_tasks(self.config.tasks, self.config.limits, Path.cwd())

    def _initial_hash(self) -> str:
        """Hash of θ₀: of its weights, and of the settings that change what a gradient or a training makes of them."""
        settings = self.config.adapter.model_dump(include={"alpha", "rank_stabilized", "dropout"})
        return sha256_json({"weights": sha256_file(self.init / "adapter_model.safetensors"), **settings})

    def _check_settings(self) -> None:
        """Refuse, before anything costly, a search that these tasks cannot have, and what shards cannot do."""
        from ray_ensemble.grouping.cases import search_cases

        if self.config.ensemble.router and self.config.gradients.shards > 1:
            raise InputError(
                "ensemble.router: true reads hidden states from the whole base on one device, and gradients.shards asks for a "
                "base in parts; leave one of them out"
            )
        search_cases(self.config.search, len(self._loaded))

    @cached_property
    def encoded(self) -> list[EncodedTask]:
        """All tasks, tokenised."""
        return encode_all(self._loaded, self._tokenizer, self.config)

    @cached_property
    def texts(self) -> list[EncodedTask]:
        """All tasks without their templates: the text alone, tokenised."""
        bare = [replace(task, prompt=bare_prompt(task.prompt)) for task in self._loaded]
        limit = self.config.limits.max_tokens
        return [encode_task(task, self._tokenizer, limit) for task in bare]

    def encode(self, tasks: Sequence[Task]) -> list[EncodedTask]:
        """Tasks from elsewhere as this run's tokenizer sees them."""
        return encode_all(tasks, self._tokenizer, self.config)

    def task(self, name: str) -> EncodedTask:
        """The task of this name."""
        return next(task for task in self.encoded if task.name == name)

    def held_out(self, name: str) -> tuple[EncodedExample, ...]:
        """The half of a task's validation examples that the search did not see: weights are fitted on it."""
        from ray_ensemble.estimator import validation_halves

        examples = self.task(name)["validation"]
        return tuple(examples[i] for i in validation_halves(len(examples))[1])

    def refuse_changed_data(self) -> None:
        """Raise `InputError` if the sources no longer hold what the run began with."""
        before = {task["name"]: task["data_hash"] for task in read_json(self.folder / "tasks.json")["tasks"]}
        changed = [task.name for task in self.encoded if before.get(task.name) != task.data_hash]
        if changed:
            raise InputError(
                f"{self.folder.name}: the data of {', '.join(changed)} are not those that this run began with "
                "(tasks.json has their hashes); restore them or choose another --output"
            )

    @cached_property
    def planned(self) -> dict[str, Any]:
        """What the plan stage found out: `plan.json`."""
        found: dict[str, Any] = read_json(self.folder / "plan.json", "plan")
        return found

    @property
    def init(self) -> Path:
        """Where the drawn θ₀ is."""
        return self.folder / "init"

    @property
    def warm(self) -> bool:
        """Whether θ₀ is trained on all tasks before the gradients."""
        return self.config.gradients.start == "meta"

    @property
    def start(self) -> Path:
        """Where θ₀ is: gradients are taken there and every adapter starts there."""
        return self.folder / "start" if self.warm else self.init

    @cached_property
    def base_hashes(self) -> dict[str, str]:
        """Hashes of the base and θ₀, and the quantization: what every cached result depends on."""
        warm = sha256_file(self.start / "adapter_model.safetensors") if self.warm else None
        return self._hashes(warm or self.planned["adapter"]["hash"])

    def _hashes(self, adapter: str) -> dict[str, str]:
        from ray_ensemble.models import model_hash

        if model_hash(self._model_folder) != self.planned["model"]["hash"]:
            raise InputError(
                f"model.source {self.config.model.source}: the model is not the one that this run began with "
                "(plan.json has its hash); restore it or choose another --output"
            )
        model = self.planned["model"]
        return {"model": model["hash"], "quantization": model["quantization"], "adapter": adapter}

    @cached_property
    def spec(self) -> Any:
        """How a worker loads the base and θ₀."""
        return self._spec_at(self.start)

    def _spec_at(self, start: Path) -> Any:
        from ray_ensemble.gradients import ReplicaSpec

        model = self.planned["model"]
        adapter = located(self.folder.path, start)
        return ReplicaSpec(self.config.model.source, model["quantization"], adapter, model["pad_id"])

    def size(self, half: str | None = None) -> ModelSize:
        """Parameters of the base and of the adapter, or of its half `lora_A` or `lora_B`, as operations are counted by them."""
        from ray_ensemble.evaluation import ModelSize

        sizes = self.planned["adapter"]["parameters"]
        return ModelSize(self.planned["model"]["backbone_parameters"], sizes[half] if half else sum(sizes.values()))

    @property
    def partition(self) -> list[list[str]]:
        """The groups that the search found, as names of tasks."""
        found: list[list[str]] = read_json(self.folder / "partition.json", "partition")["groups"]
        return found

    @property
    def group_names(self) -> list[str]:
        """Names of the groups' adapters."""
        return [f"group-{g}" for g in range(len(self.partition))]

    def own_group(self, task: str) -> int:
        """The group that a task is in."""
        return next(g for g, group in enumerate(self.partition) if task in group)

    @property
    def members(self) -> list[str]:
        """The adapters that an ensemble weighs: the groups', and the common start where it was trained."""
        return [*self.group_names, *(["start"] if self.warm else [])]

    def adapter_folder(self, name: str) -> Path:
        """Where the adapter of this name is kept in the run folder; `start` is where all of them started."""
        if name == "start":
            return self.start
        kinds = {"qlora_all": "baselines", "booster": "boosters"}
        return self.folder / kinds.get(name.partition("-")[0], "adapters") / name

    def scored_adapter(self, name: str) -> Path | None:
        """As `adapter_folder`, for scores: None, the bare base, for a start that was not trained and adds nothing to it."""
        return None if name == "start" and not self.warm else self.adapter_folder(name)


def encode_all(tasks: Sequence[Task], tokenizer: Any, config: JobConfig) -> list[EncodedTask]:
    """All tasks as the job's tokenizer sees them, within its token limit."""
    return [encode_task(task, tokenizer, config.limits.max_tokens, config.model.chat) for task in tasks]


def _describe(task: Task, encoded: EncodedTask) -> dict[str, Any]:
    examples = [example for split in encoded.splits.values() for example in split]
    return {
        "name": task.name,
        "prompt": task.prompt,
        "labels": list(task.labels),
        **{split: len(found) for split, found in task.splits.items()},
        "truncated": sum(example.truncated for example in examples),
        "mean_tokens": round(sum(len(e.prompt_ids) for e in examples) / len(examples), 1),
        "data_hash": encoded.data_hash,
    }


def _features(store: GradientStore, trained: dict[str, int]) -> list[TaskFeatures]:
    """The gradient store as the estimator takes it, with the number of examples that each task is trained on."""
    from ray_ensemble.estimator import TaskFeatures, pairwise_margins

    found = []
    for name in store.tasks:
        train, validation = store[name, "train"], store[name, "validation"]
        if validation.class_scores is None or validation.class_features is None:
            raise InputError(f"{store.folder}/{name}/validation: no class scores; run the gradients stage again")
        rows, margins, starts = train.features, train.margins, None
        if train.class_scores is not None and train.class_features is not None:
            rows, margins, starts = pairwise_margins(train.class_scores, train.class_features, train.labels)
        found.append(
            TaskFeatures(
                name=name,
                train_features=rows,
                train_margins=margins,
                train_starts=starts,
                validation_scores=validation.class_scores,
                validation_features=validation.class_features,
                validation_labels=validation.labels,
                trained=trained[name],
            )
        )
    return found
