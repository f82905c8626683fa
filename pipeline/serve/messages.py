"""What gateway and replica say to each other: plain records, the same for a streamed answer and a whole one."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.openai_api.events import Delta, Ended, TokenText
from pipeline.package import Routing

__all__ = [
    "Ask",
    "Backend",
    "Delta",
    "Ended",
    "Event",
    "ModelCard",
    "Refused",
    "ReplicaBackend",
    "Started",
    "TokenText",
]


@dataclass(frozen=True)
class Ask:
    """A checked request on its way to a replica.

    Args:
        request_id: In every response and log line about it.
        expert: The expert that answers, by its served name.
        fields: `prompt`, `messages`, `schema`, `dialect`, `system`, as `RequestBuilder.build` takes them.
        options: Any of `pipeline.engine.requests.OPTION_NAMES`, as a batch row has them.
        is_streamed: Whether text is wanted as it comes; otherwise each answer comes whole.
        deadline: Seconds from its arrival at the replica after which it is cancelled.
        trace: The span that it belongs to; see `pipeline.tracing.current_headers`.
    """

    request_id: str
    expert: str
    fields: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    is_streamed: bool = False
    deadline: float | None = None
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The prompt is checked and waits for, or is in, the running batch. The first event, unless it is `Refused`."""

    prompt_tokens: int


@dataclass(frozen=True)
class Refused:
    """The request is not answered, and nothing was computed: one of our errors, told by its code."""

    code: str
    message: str
    hint: str


Event = Started | Delta | Ended | Refused


@dataclass(frozen=True)
class ModelCard:
    """An expert as `GET /v1/models` shows it.

    Args:
        name: The served name: what a request's `model` says.
        base: The base model's name.
        version: The package's version.
        digest: The package's sha256.
        kind: `lora`, `dora`, `ia3`, ...
        description: From the manifest, if it says anything.
        takes_schema: Whether the expert was made to be given a schema.
        dialects: The dialects that a request may choose from; the first is its own.
        routing: What its manifest says of the prompts it is for.
    """

    name: str
    base: str
    version: str
    digest: str
    kind: str
    description: str | None = None
    takes_schema: bool = False
    dialects: tuple[str, ...] = ()
    routing: Routing = field(default_factory=Routing)


class Backend(Protocol):
    """The seam behind the gateway: a Serve deployment in production, an engine in the same process in tests."""

    def ask(self, ask: Ask) -> AsyncIterator[Event]:
        """Answer: `Started`, then `Delta`s, then one `Ended` for each of the `n` answers; or `Refused` alone.

        Closing the iterator cancels the request within one step of the engine.

        Raises:
            ExpertError: The replica is gone; nothing more comes.
        """
        ...


class ReplicaBackend(Backend, Protocol):
    """Answers from replicas; see `pipeline.serve.gateway.HandleBackend`."""

    async def warm_up(self) -> None:
        """Make the first call, so that no client pays for it."""
        ...

    async def is_ready(self) -> bool:
        """Whether a replica of every base model answers."""
        ...
