"""Importing the package brings in neither torch nor Ray before they are needed."""

import subprocess
import sys

import pytest

EXTRAS = ("langchain_core", "llama_index", "gradio", "opentelemetry", "prompt_toolkit")
HEAVY = ("torch", "ray", "transformers", "peft", "pandas", "pyarrow")


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(name for name in sys.modules if '.' not in name))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_import_pipeline_is_light() -> None:
    assert not modules_after("import pipeline; pipeline.demo.BASE_MODEL; pipeline.errors.ExpertError") & set(HEAVY)


@pytest.mark.parametrize("room", ["package", "engine"])
def test_lower_rooms_know_no_ray(room: str) -> None:
    assert not modules_after(f"import pipeline.{room}") & {"torch", "ray", "transformers", "peft"}


@pytest.mark.parametrize("modules", ["serve.gateway, pipeline.serve.app", "batch.run, pipeline.batch.worker"])
def test_what_computes_nothing_knows_no_torch(modules: str) -> None:
    """The gateway and the drivers: torch would be seconds of their start, and hundreds of megabytes."""
    assert not modules_after(f"import pipeline.{modules}") & {"torch", "transformers", "peft"}


def test_the_engine_runs_without_ray() -> None:
    assert not modules_after("import pipeline.engine.runtime, pipeline.expert, pipeline.integrations") & {
        "ray",
        *EXTRAS,
    }


def test_import_pipeline_brings_in_nothing_but_the_standard_library() -> None:
    """So it takes no time: nothing of what takes some is there."""
    assert modules_after("import pipeline") - modules_after("pass") - sys.stdlib_module_names == {"pipeline"}


def test_every_public_name_is_there() -> None:
    import pipeline

    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="nothing"):
        _ = pipeline.nothing
