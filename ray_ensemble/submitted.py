"""What a submitted job runs on the head: `python -m ray_ensemble.submitted`, in the folder of its package.

Ray unpacks a package below its session's folder, which is another one after every start of the cluster, and is not there on
every node. The data are therefore put beside the run folder, under a name that depends on their contents alone, so that a later
submission of the same job is the same job, and goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_ensemble.cli import main as run_command
from ray_ensemble.config import dump_config, load_config
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import whole_folder, write_text
from ray_ensemble.job_package import INPUTS, JobPackage
from ray_ensemble.storage import run_place, store_at


def arguments_for(output: str, digest: str | None, needed: Sequence[str], redo: bool) -> list[str]:
    """The arguments that `main` reads."""
    return [
        *("--output", output),
        *(("--inputs", digest) if digest else ()),
        *(part for name in needed for part in ("--env", name)),
        *(("--redo",) if redo else ()),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the environment, put the data in place, run the job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ray_ensemble.submitted")
    parser.add_argument("--output", required=True)
    parser.add_argument("--inputs", default=None)
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--redo", action="store_true")
    options = parser.parse_args(arguments)
    package = JobPackage(Path.cwd(), options.inputs)
    try:
        missing = [name for name in options.env if not os.environ.get(name)]
        if missing:
            raise InputError(
                f"--env {', '.join(missing)}: not set on the cluster; give it to the nodes (a mounted secret, the "
                "container's environment), since values are not sent with a job"
            )
        place = run_place(options.output)
        if not package.digest:
            job = package.job
        else:
            job = put_inputs(package, place) if isinstance(place, str) else place_inputs(package, place)
    except (InputError, RunError) as error:
        print(f"ray-ensemble: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return run_command(["run", str(job), "--output", options.output, *(["--redo"] if options.redo else [])])


def place_inputs(package: JobPackage, output: Path) -> Path:
    """Put a package's data to `<output>.inputs/<digest>/`, unless they are there; returns the job file there.

    Raises:
        InputError: the folder cannot be written.
    """
    target = output.with_name(f"{output.name}.inputs") / str(package.digest)
    try:
        if not target.is_dir():
            with whole_folder(target) as temporary:
                shutil.copytree(package.folder / INPUTS, temporary / INPUTS)
        write_text(target / package.job.name, package.job.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--output {output}: {target} cannot be written ({error.strerror})") from None
    return target / package.job.name


def put_inputs(package: JobPackage, output: str) -> Path:
    """As `place_inputs`, for a run at a URL: the job's sources become URLs, which every node can read.

    Raises:
        InputError: the store refuses it, or a data set that `hf:` names is among the inputs.
        RunError: the store does not answer.
    """
    address, mark, settings = output.partition("?")
    target = f"{address}.inputs/{package.digest}"
    folder, config = package.folder.resolve(), load_config(package.job)

    def placed(source: str) -> str:
        local = Path(source.removeprefix("hf:"))
        if not local.is_relative_to(folder):
            return source
        if source.startswith("hf:"):
            raise InputError(
                f"{source}: a saved data set cannot be sent with a job whose --output is a URL; put it where the head sees "
                "it and give its absolute path"
            )
        return f"{target}/{local.relative_to(folder).as_posix()}{mark}{settings}"

    model = config.model.model_copy(update={"source": placed(config.model.source)})
    tasks = [task.model_copy(update={"source": placed(task.source)}) for task in config.tasks]
    store = store_at(f"{target}{mark}{settings}")
    for path in sorted((folder / INPUTS).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and ((about := store.about(name)) is None or about.size != path.stat().st_size):
            store.put(name, path)
    job = folder / "at-url" / package.job.name
    write_text(job, dump_config(config.model_copy(update={"model": model, "tasks": tasks})))
    return job


if __name__ == "__main__":
    sys.exit(main())
