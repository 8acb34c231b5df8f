"""What Ray Train's controllers do for us: note why workers were lost, and give back what failed attempts hold.

Every job has a controller, a process of its own, so nothing here imports torch or PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_ensemble.runtime import release_orphaned_groups
from ray_ensemble.storage import run_copy
from ray_ensemble.training.pack import Interruption, Pack, note_interruption, step_lost


def interruption_watch(run: str, pack: Pack) -> Any:
    """A callback of Ray Train's controller that notes why workers were lost: micro-batches get smaller where it was memory."""
    from ray.train import UserCallback

    class InterruptionWatch(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            errors = list(worker_exceptions.values())
            if any(step_lost(error) for error in errors):
                return  # that worker has written it down
            with run_copy(run, pack.read_by(1)) as copy:
                note_interruption(pack.folder(copy.folder), interruption(errors))

    return InterruptionWatch()


def group_release() -> Any:
    """A callback of Ray Train's controller that removes the placement group of an attempt that could not be set up.

    Ray Train forgets it, and the next attempt would wait for the resources that it holds.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class GroupRelease(WorkerGroupCallback):  # type: ignore[misc]
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            import ray

            release_orphaned_groups(ray.get_runtime_context().get_actor_id())

    return GroupRelease()


def interruption(errors: Sequence[BaseException]) -> Interruption:
    """What ended workers, by their errors: memory before a pre-empted node, and that before any other failure."""
    if any(is_memory_kill(error) for error in errors):
        return "memory"
    causes = [*errors, *(cause for error in errors if (cause := error.__cause__) is not None)]
    return "preemption" if any(getattr(cause, "preempted", False) for cause in causes) else "failure"


def is_memory_kill(error: BaseException) -> bool:
    """Whether Ray's memory monitor ended a worker that this error, of one or of a whole Ray Train run, is about."""
    from ray.exceptions import OutOfMemoryError

    causes = [error, getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
    return any(isinstance(cause, OutOfMemoryError) or "running low on memory" in str(cause) for cause in causes)


def is_lost_actor(error: BaseException) -> bool:
    """Whether a whole Ray Train run ended because its controller could not reach one of the run's actors.

    Ray Train counts most of these as failures of workers, and tries again. Not so where a node goes while a worker unpickles what
    it is to run, which takes seconds, since the base's libraries are imported then.
    """
    from ray.exceptions import RayActorError

    return isinstance(getattr(error, "controller_failure", None), RayActorError)
