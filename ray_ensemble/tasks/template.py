"""Prompt templates: `{field}` stands for a field of the data.

Only braces around an identifier are placeholders; all other braces stay as they are. Substitution is one pass, so
braces in the data are never looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray_ensemble.errors import InputError

_PLACEHOLDER = re.compile(r"\{([^\W\d]\w*)\}")


def prompt_fields(prompt: str) -> tuple[str, ...]:
    """The fields that a prompt names, each once, in their order."""
    return tuple(dict.fromkeys(_PLACEHOLDER.findall(prompt)))


def render(prompt: str, fields: Mapping[str, str]) -> str:
    """The prompt with its placeholders replaced; a field that is not there is a `KeyError`."""
    return _PLACEHOLDER.sub(lambda match: fields[match[1]], prompt)


def bare_prompt(prompt: str) -> str:
    """The fields that a prompt names without its template, a line each: what is known of an input whose dataset is not."""
    return "".join(f"{{{name}}}\n" for name in prompt_fields(prompt))


def checked_prompt(prompt: str | None, where: str) -> str:
    """The prompt itself, if it names at least one field.

    Raises:
        InputError: there is no prompt, or it names no field.
    """
    if prompt is None:
        raise InputError(f"{where}: 'prompt' is missing (a template such as \"{{text}}\\nAnswer:\")")
    if not prompt_fields(prompt):
        raise InputError(f"{where}: the prompt {prompt!r} names no field of the data, such as {{text}}")
    return prompt
