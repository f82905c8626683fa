"""A page to try an expert in a browser, by Gradio; `pip install "expert-pipeline[gradio]"`."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from pipeline.errors import ExpertError
from pipeline.integrations.asked import Asked, raise_missing

try:
    import gradio
except ImportError as error:
    raise_missing("gradio", "gradio", error)

__all__ = ["chat_page"]


def chat_page(asked: Asked, *, title: str, **options: Any) -> gradio.ChatInterface:
    """A conversation with an expert, its text as it comes, with a field for the schema; `launch` shows it.

    Nothing is told to Gradio's makers. Several people are answered at a time, in one running batch; who closes the page
    or stops an answer cancels it.

    Args:
        asked: What answers.
        title: Stands above it.
        options: Of every prompt; see `Expert.generate`.
    """

    def answer(prompt: str, history: Sequence[dict[str, Any]], schema: str) -> Iterator[str]:
        said = [message for message in map(_message, history) if message["content"].strip()]
        messages = [*said, {"role": "user", "content": prompt}]
        try:
            with closing(asked.stream(**{**options, "messages": messages, "schema": schema.strip() or None})) as stream:
                text = ""
                for piece in stream:
                    text += piece
                    yield text
        except ExpertError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error

    schema = gradio.Textbox(label="Schema", lines=6, value=str(options.pop("schema", None) or ""))
    return gradio.ChatInterface(
        answer,
        title=title,
        additional_inputs=[schema],
        concurrency_limit=None,
        analytics_enabled=False,
        api_name="chat",
    )


def _message(said: dict[str, Any]) -> dict[str, str]:
    """A message of Gradio's history: its content is a text, or a list of blocks."""
    content = said["content"]
    text = content if isinstance(content, str) else "".join(block["text"] for block in content)
    return {"role": said["role"], "content": text}
