"""What a cached adapter is found by: new settings must not lose what was trained before them."""

from __future__ import annotations

import pytest

from ray_ensemble.config import JobConfig
from ray_ensemble.files import sha256_json
from ray_ensemble.tasks import EncodedExample, EncodedTask, split_hash
from ray_ensemble.training import AdapterJob, job_key

JOB = AdapterJob("group-0", ("a",), 40, 3)
BASE = {"model": "m", "adapter": "t"}


def task(name: str, validation: int = 4) -> EncodedTask:
    examples = tuple(EncodedExample((1, 2, i), i % 2, False) for i in range(4))
    held = tuple(EncodedExample((5, i), i % 2, False) for i in range(validation))
    return EncodedTask(name, ("no", "yes"), ((7,), (8,)), {"train": examples, "validation": held, "test": held}, "")


def key(training=None, **options) -> str:
    config = JobConfig.model_validate({"model": {"source": "a/b"}, "tasks": ["/d"], "training": training or {}})
    return job_key(JOB, [task("a", **options), task("b")], config, BASE)


def test_default_settings_have_the_key_that_they_always_had():
    settings = {
        "batch_size": 8, "learning_rate": 1e-3, "warmup": 0.1, "schedule": "linear", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "strategy": "none", "threads": 1,
    }  # fmt: skip
    data = [["a", split_hash(task("a"), task("a")["train"])]]
    content = {"data": data, "steps": 40, "seed": 3, "training": settings, "base": BASE}
    assert key() == sha256_json(content)[:20]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 2e-3},
        {"threads": 2},
        {"sampling": "tasks"},
        {"precision": "bf16"},
        {"optimizer": "paged_adamw"},
        {"early_stop": {}},
        {"strategy": "fsdp2"},
    ],
)
def test_what_changes_the_result_changes_the_key(changes):
    assert key(changes) != key()


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 9},
        {"batch_tokens": 99},
        {"activation_checkpointing": True},
        {"concurrency": 2},
        {"workers": 2},
    ],
)
def test_what_changes_only_the_way_there_does_not(changes):
    assert key(changes) == key()


def test_where_the_state_is_kept_does_not_change_the_key():
    assert key({"strategy": "zero3", "offload": True}) == key({"strategy": "zero3"})


def test_validation_examples_count_where_they_decide_when_to_stop():
    stop = {"early_stop": {"every": 5}}
    assert key(stop) != key({"early_stop": {"every": 6}})
    assert key(stop, validation=6) != key(stop)
    assert key(validation=6) == key()
