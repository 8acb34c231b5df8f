"""Prompt templates: one pass, and only `{identifier}` is a placeholder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ensemble.errors import InputError
from ray_ensemble.tasks import prompt_fields, render
from ray_ensemble.tasks.template import checked_prompt

braced = st.text(alphabet="{}ab_0 ")


@given(braced, braced)
def test_braces_in_data_are_never_substituted(a: str, b: str) -> None:
    assert render("<{a}|{b}>", {"a": a, "b": b}) == f"<{a}|{b}>"


def test_only_identifiers_are_placeholders() -> None:
    prompt = '{"k": {}, {0}, { x }, {a.b}, {a}} {naïve_1}{a}'
    assert prompt_fields(prompt) == ("a", "naïve_1")
    assert render(prompt, {"a": "{naïve_1}", "naïve_1": "n"}) == '{"k": {}, {0}, { x }, {a.b}, {naïve_1}} n{naïve_1}'


@pytest.mark.parametrize("prompt", ["", "Answer:", "{}", "{0}", '{"a": 1}'])
def test_prompt_without_a_field_is_refused(prompt: str) -> None:
    with pytest.raises(InputError, match=r"here: the prompt .* names no field"):
        checked_prompt(prompt, "here")
