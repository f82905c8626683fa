"""How much a client may ask for, and how long anything may take."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.engine.types import MAX_ANSWERS

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_HostName = Annotated[str, Field(min_length=1, pattern=r"^[^\s/@]+$")]


class LimitsConfig(BaseModel):
    """Bounds on requests. Each is for one gateway replica; what is beyond one is refused, never cut down silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_body_bytes: int = Field(1 << 20, ge=1, le=1 << 28, description="Largest body of a request, in bytes.")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Longest prompt, in tokens; left out, what the model's context holds."
    )
    max_tokens: int = Field(4096, ge=1, le=1 << 31, description="Most tokens that a request may ask for, each answer.")
    max_answers: int = Field(
        MAX_ANSWERS, ge=1, le=MAX_ANSWERS, description="Most answers (n) that a request may ask for."
    )
    max_requests_per_key: int = Field(
        256, ge=1, description="Requests that one API key may have running and waiting at once; more are refused (429)."
    )
    max_requests: int = Field(
        512, ge=1, description="Requests running and waiting at once, all clients together; more are refused (429)."
    )
    max_seconds: float = Field(
        600.0,
        gt=0,
        le=86_400,
        allow_inf_nan=False,
        description="Deadline of a request, in seconds; a client may ask for a shorter one with `timeout`.",
    )
    body_seconds: float = Field(
        30.0, gt=0, le=86_400, allow_inf_nan=False, description="Time that a client has to send a request's body."
    )
    send_seconds: float = Field(
        30.0,
        gt=0,
        le=86_400,
        allow_inf_nan=False,
        description="Time that a client has to take one piece of an answer before it is cut off.",
    )
    retry_after_seconds: int = Field(
        1, ge=1, le=3600, description="What a refused client is told to wait before it asks again."
    )
    allowed_hosts: Annotated[tuple[_HostName, ...], Field(min_length=1), BeforeValidator(_listed)] = Field(
        LOOPBACK_HOSTS,
        description='Names under which clients may address the service (Host); "*.example.org" and "*" stand for more.',
        json_schema_extra={"expected": "a non-empty list of host names"},
    )
