"""What is wrong with a job file, in one line."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from ray_ensemble.errors import nearest

_UNION_TAGS = {"int", "float", "str", "bool", "constrained-int", "constrained-float"}


def explain(error: ValidationError, root: type[BaseModel], listed: type[BaseModel]) -> str:
    """One line about the first problem, with the known keys and the nearest one where a key is unknown.

    Args:
        error: what pydantic found.
        root: the model of the whole file.
        listed: the model of what lists hold.
    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    if _is_of_another_kind(problem):
        # A key that takes several kinds of values: what is wrong with the kind that was given, or all that it takes.
        same = [
            each for each in problems if each["loc"][:2] == problem["loc"][:2] and each["input"] == problem["input"]
        ]
        problem = next((each for each in same if not _is_of_another_kind(each)), problem)
        if _is_of_another_kind(problem):
            kinds = dict.fromkeys(each["msg"].removeprefix("Input should be ") for each in same)
            problem = {**problem, "msg": f"Input should be {', or '.join(kinds)}"}
    place = [part for part in problem["loc"] if not (isinstance(part, str) and ("[" in part or part in _UNION_TAGS))]
    where = ".".join(str(part) for part in place) or "the job file"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(place[:-1], root, listed)
        rest = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        return f"unknown key '{where}'{nearest(str(place[-1]), known)} (known keys: {', '.join(known)}){rest}"
    if problem["type"] == "missing":
        return f"'{where}' is missing and has no default"
    return f"'{where}': {problem['msg'].lower()}, got {problem['input']!r}"


def _is_of_another_kind(problem: Any) -> bool:
    kind = str(problem["type"])
    return kind == "literal_error" or kind.endswith("_type")


def _known_keys(path: list[Any], root: type[BaseModel], listed: type[BaseModel]) -> list[str]:
    section = root
    for part in path:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        section = inner[0] if inner else listed
    return list(section.model_fields)
