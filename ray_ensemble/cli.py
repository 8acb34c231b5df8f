"""The command line: one verb per stage, no logic. Exit codes: 0 done, 1 failed or partial, 2 wrong input or use."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_ensemble.errors import InputError, RunError
from ray_ensemble.version import __version__

_VERBS = {
    "run": "all stages, going on where an earlier run of the same job stopped",
    "plan": "resolve the job: config.yaml, plan.json and the starting point of the adapters",
    "tasks": "preview rendered prompts and label words as the tokenizer sees them",
    "gradients": "projected per-example gradients of every dataset",
    "search": "affinity and the best partition, by Ray Tune",
    "train": "one adapter a group and the baseline, by Ray Train",
    "ensemble": "weights of each dataset over the adapters",
    "evaluate": "all models on the test splits: metrics.json",
    "report": "report.html and plots",
    "validate": "really fine-tune sampled subsets and hold the estimate against them",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `ray-ensemble`; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code = _dispatch(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InputError as error:
        print(f"ray-ensemble: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"ray-ensemble: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ray-ensemble: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _dispatch(options: argparse.Namespace) -> int:
    if options.verb in _OTHERS:
        return _OTHERS[options.verb](options)
    from ray_ensemble.pipeline import Job

    job = Job.from_yaml(options.job, options.set)
    if options.verb == "tasks":
        if options.output is not None:
            job.through("tasks", options.output, redo=options.redo)
        _print(*job.preview())
        return 0
    output = options.output or Path("runs") / Path(options.job).stem
    if options.verb == "validate":
        from ray_ensemble.report import validation_summary

        found = job.validate(output, subsets=options.subsets, repeats=options.repeats, redo=options.redo)
        _print(validation_summary(found))
        return 0
    result = job.through("report" if options.verb == "run" else options.verb, output, redo=options.redo)
    if options.verb in ("run", "report"):
        from ray_ensemble.report import terminal_summary

        _print(terminal_summary(result.folder))
    elif options.verb == "search":
        from ray_ensemble.report import search_summary

        _print(search_summary(result.folder))
    else:
        print(f"{options.verb}: done, in {result.url or result.folder}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from ray_ensemble.serving import check_rows, predict_file

    if options.input is not None:
        how = {"task": options.task, "merged": options.merged, "generate": options.generate}
        predict_file(options.run, options.input, options.output, **how)
        return 0
    if options.output is not None:
        raise InputError("--output: is for a file of rows, with --input; redirect standard output instead")
    from ray_ensemble.ensemble import Predictor
    from ray_ensemble.tasks import parse_lines

    predictor = Predictor(options.run, None if options.task is None else [options.task], options.merged)
    rows = check_rows(parse_lines(sys.stdin.buffer, "standard input"), "standard input", predictor.tasks, options.task)
    requests = [request for _, request in rows]
    found = predictor.predict(requests) if options.generate is None else predictor.generate(requests, options.generate)
    for prediction in found:
        print(json.dumps(prediction, ensure_ascii=False))
    return 0


def _weights(options: argparse.Namespace) -> int:
    from ray_ensemble.report import unseen_summary
    from ray_ensemble.storage import without_settings
    from ray_ensemble.unseen import EXAMPLES, unseen_weights

    if options.examples is not None and options.examples < 0:
        raise InputError(f"--examples {options.examples}: give a number of examples, 0 for none")
    examples = EXAMPLES if options.examples is None else options.examples
    found = unseen_weights(options.run, options.task_folder, examples)
    _print(unseen_summary(found), f"\nwritten: {without_settings(options.run)}/unseen/{found['name']}.json")
    return 0


def _serve(options: argparse.Namespace) -> int:
    from ray_ensemble.config import ServingConfig, serving_config
    from ray_ensemble.serving import serve_run

    serve_run(options.run, serving_config({key: getattr(options, key, None) for key in ServingConfig.model_fields}))
    return 0


def _export(options: argparse.Namespace) -> int:
    from ray_ensemble.ensemble.export import check_push, export_run, push_to_hub, vllm_command

    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    folder = export_run(options.run, options.output)
    print(f"exported to {folder}; with vLLM, BASE being the base model:\n{vllm_command(folder)}")
    if options.push_to_hub is not None:
        print(f"pushed to {push_to_hub(folder, options.push_to_hub)}")
    return 0


def _submit(options: argparse.Namespace) -> int:
    from ray_ensemble.submission import Submission, submit

    if [options.job, options.attach, options.cancel].count(None) != 2:
        raise InputError("submit: give a job file, or --attach ID, or --cancel ID")
    if options.cancel is not None:
        stopped = Submission(options.address, options.cancel).cancel()
        print(f"{options.cancel}: {'cancelled' if stopped else 'had ended before'}")
        return 0
    if options.attach is not None:
        submission = Submission(options.address, options.attach)
    else:
        if options.output is None:
            raise InputError(
                "submit: --output is needed, a URL or an absolute path that every node of the cluster sees"
            )
        submission = submit(
            options.job,
            address=options.address,
            output=options.output,
            overrides=options.set,
            wheel=options.wheel,
            environment=options.env,
            redo=options.redo,
        )
        print(f"submitted {submission.id}", flush=True)
    if not options.follow:
        print(submission.hint())
        return 0
    try:
        return submission.follow()
    except KeyboardInterrupt:
        print(f"\n{submission.id} goes on; {submission.hint()}", file=sys.stderr)
        return 130


def _status(options: argparse.Namespace) -> int:
    from ray_ensemble.status import run_status, status_text

    found = run_status(options.run)
    print(json.dumps(found, indent=2, ensure_ascii=False) if options.json else status_text(found))
    return 0


_OTHERS = {
    "predict": _predict,
    "weights": _weights,
    "serve": _serve,
    "export": _export,
    "submit": _submit,
    "status": _status,
}


def _print(*renderables: Any) -> None:
    from rich.console import Console

    # Where there is no terminal (a log, CI) a table must not be folded to 80 columns.
    columns = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() else int(columns) if columns.isdecimal() and int(columns) else 120
    Console(width=width, highlight=False).print(*renderables, sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray-ensemble",
        description="Fine-tune one language model on many datasets: group them by first-order estimates, "
        "train one adapter a group on Ray, and combine them.",
    )
    parser.add_argument("--version", action="version", version=f"ray-ensemble {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in _VERBS.items():
        command = verbs.add_parser(verb, help=text, description=text)
        command.add_argument("job", help="the job file (YAML)")
        command.add_argument(
            "--output", "-o", default=None, help="the run folder, a path or URL (default: runs/<name of the job file>)"
        )
        command.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a value of the job file"
        )
        command.add_argument(
            "--redo", action="store_true", help="recompute what depends on keys that differ from the folder's config"
        )
        if verb == "validate":
            command.add_argument("--subsets", type=int, default=12, help="subsets to fine-tune (default: 12)")
            command.add_argument(
                "--repeats",
                type=int,
                default=None,
                help="of these, how many again with another seed (default: 3, or all where there are fewer)",
            )
    predict = verbs.add_parser("predict", help="label rows, or continue them, with a finished run's ensembles")
    predict.add_argument("run", help="the run folder")
    predict.add_argument("--task", default=None, help="the dataset of all rows (default: each row's own 'task')")
    predict.add_argument("--merged", action="store_true", help="by merged adapters: one pass a row")
    predict.add_argument("--input", default=None, help="a JSONL file of rows, done by Ray (default: standard input)")
    predict.add_argument("--output", "-o", default=None, help="the JSONL file to write (default: standard output)")
    predict.add_argument(
        "--generate", type=int, default=None, metavar="N", help="write up to N tokens in place of choosing a label word"
    )
    weights = verbs.add_parser("weights", help="weights of a finished run's adapters for a dataset that was not in it")
    weights.add_argument("run", help="the run folder")
    weights.add_argument("--task-folder", required=True, help="task.json, and train.jsonl or validation.jsonl")
    weights.add_argument(
        "--examples",
        type=int,
        default=None,
        help="labelled examples to use at most (default: 256; 0: go without labels)",
    )
    serve = verbs.add_parser("serve", help="answer over HTTP with a finished run's ensembles, by Ray Serve")
    serve.add_argument("run", help="the run folder")
    serve.add_argument("--host", default=None, help="where to listen (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=int, default=None, help="(default: 8000)")
    serve.add_argument("--merged", action="store_true", help="by merged adapters: one pass a row")
    serve.add_argument("--replicas", type=int, default=None, help="copies of the base (default: 1)")
    serve.add_argument("--batch-size", type=int, default=None, help="rows in one batch at most (default: 64)")
    serve.add_argument("--batch-wait", type=float, default=None, help="seconds to wait for them (default: 0.01)")
    serve.add_argument("--queue", type=int, default=None, help="requests that may wait (default: 1000)")
    export = verbs.add_parser("export", help="a finished run's adapters as a folder for peft, vLLM and the hub")
    export.add_argument("run", help="the run folder")
    export.add_argument("--output", "-o", required=True, help="the folder to write; it must not exist or be empty")
    export.add_argument(
        "--push-to-hub", default=None, metavar="OWNER/NAME", help="upload it too; a new repository is private"
    )
    submit = verbs.add_parser("submit", help="run a job on a Ray cluster elsewhere, by its job server")
    submit.add_argument("job", nargs="?", default=None, help="the job file; data at relative paths are sent with it")
    submit.add_argument("--address", required=True, help="the job server, such as http://127.0.0.1:8265")
    submit.add_argument(
        "--output", "-o", default=None, help="the run folder, a URL or an absolute path that every node sees"
    )
    submit.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a value of the job file"
    )
    submit.add_argument("--redo", action="store_true", help="as for run")
    submit.add_argument("--wheel", default=None, help="a wheel of ray_ensemble for a cluster that does not have it")
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable that the cluster must have set (no value)",
    )
    submit.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the log until the job ends (default)",
    )
    submit.add_argument("--attach", default=None, metavar="ID", help="follow a job that was submitted before")
    submit.add_argument("--cancel", default=None, metavar="ID", help="stop a job")
    status = verbs.add_parser("status", help="how far a run is, from the files of its folder")
    status.add_argument("run", help="the run folder")
    status.add_argument("--json", action="store_true", help="as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
