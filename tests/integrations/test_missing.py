"""A library that is not installed is named, with what installs it; none is imported before it is asked for."""

import importlib
import sys

import pytest

from pipeline import Expert, demo
from pipeline.errors import MissingDependencyError

FIRST = {
    "langchain": "langchain_core.language_models.chat_models",
    "llamaindex": "llama_index.core.base.llms.generic_utils",
    "gradio": "gradio",
}


@pytest.mark.parametrize("extra", FIRST)
def test_a_missing_library_says_what_to_install(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"pipeline.integrations.{extra}", raising=False)
    monkeypatch.setitem(sys.modules, FIRST[extra], None)
    with pytest.raises(MissingDependencyError, match="is not installed") as caught:
        importlib.import_module(f"pipeline.integrations.{extra}")
    assert f'pip install "expert-pipeline[{extra}]"' in caught.value.hint
    assert isinstance(caught.value.__cause__, ImportError)


def test_the_page_of_an_expert_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.integrations.gradio", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingDependencyError, match="gradio"):
        Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL).to_gradio()
