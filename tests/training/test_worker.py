"""What a worker does about the fate of those before it."""

from __future__ import annotations

import json
import pickle

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.util import construct_user_exception_with_traceback

from ray_ensemble.config import TrainingConfig
from ray_ensemble.training.callbacks import interruption, is_lost_actor, is_memory_kill
from ray_ensemble.training.pack import StepLost, interruptions, note_interruption, read_row, step_lost
from ray_ensemble.training.worker import within_memory


def test_every_kill_for_memory_halves_micro_batches_and_never_below_a_token(tmp_path):
    training = TrainingConfig(batch_tokens=600)
    found = []
    for _ in range(12):
        found.append(within_memory(training, tmp_path / "checkpoints" / "job", "cpu").batch_tokens)
        note_interruption(tmp_path / "checkpoints" / "job", "memory")
        note_interruption(tmp_path / "checkpoints" / "job", "preemption")
    assert found[:5] == [600, 300, 150, 75, 37]
    assert found[-1] == 1
    assert interruptions(tmp_path / "checkpoints" / "job") == ["memory", "preemption"] * 12
    assert interruptions(tmp_path / "none") == []
    unset = TrainingConfig()
    assert within_memory(unset, tmp_path / "checkpoints" / "job", "cpu").batch_tokens == 1
    for device in ("cpu", "cuda"):
        assert within_memory(unset, tmp_path / "other", device).tokens_of(device) == unset.tokens_of(device)


def test_a_micro_batch_that_did_not_fit_is_halved_whoever_tells_of_it(tmp_path):
    training, checkpoints = TrainingConfig(batch_tokens=600), tmp_path / "job"
    for tokens, wanted in [(250, 125), (240, 120), (600, 120), (120, 60), (None, 30), (1, 1)]:
        note_interruption(checkpoints, "memory", tokens)
        assert within_memory(training, checkpoints, "cpu").batch_tokens == wanted
    assert interruptions(checkpoints) == ["memory"] * 6


def test_a_step_that_a_worker_lost_is_known_by_its_error_as_ray_train_hands_it_on():
    lost = StepLost("out of memory at step 3", 240)
    wrapped = pickle.loads(pickle.dumps(construct_user_exception_with_traceback(lost)))
    assert [(str(found), found.tokens) for found in (step_lost(lost), step_lost(wrapped))] == [(str(lost), 240)] * 2
    assert step_lost(construct_user_exception_with_traceback(RuntimeError("out of memory"))) is None


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OutOfMemoryError("Task was killed"), True),
        (RuntimeError("1 worker(s) were killed due to the node running low on memory. Memory was 23.1GB"), True),
        (ActorDiedError(), False),
        (RuntimeError("boom"), False),
    ],
)
def test_kills_for_memory_are_told_from_other_deaths(error, wanted):
    assert is_memory_kill(error) is wanted


def test_runs_that_an_actor_out_of_reach_has_ended_are_told_from_others():
    gone = ActorUnavailableError("Socket closed", None)
    assert is_lost_actor(pickle.loads(pickle.dumps(ControllerError(gone))))
    assert is_lost_actor(ControllerError(ActorDiedError()))
    assert not is_lost_actor(ControllerError(RuntimeError("boom")))
    assert not is_lost_actor(WorkerGroupError("lost", {0: gone}))  # which Ray Train itself tries again
    assert not is_lost_actor(gone)


def test_pre_empted_nodes_are_told_from_failures_also_as_causes():
    gone, wrapped = ActorDiedError(), RuntimeError("the health check failed")
    gone._preempted = True
    wrapped.__cause__ = gone
    assert interruption([RuntimeError("boom"), ActorDiedError()]) == "failure"
    assert interruption([RuntimeError("boom"), gone]) == "preemption"
    assert interruption([wrapped]) == "preemption"
    assert interruption([gone, OutOfMemoryError("Task was killed")]) == "memory"


def test_a_row_that_a_kill_cut_off_is_no_row():
    row = {"step": 3, "loss": 0.5}
    line = json.dumps(row)
    assert read_row(line) == row
    assert all(read_row(line[:length]) is None for length in range(len(line)))
