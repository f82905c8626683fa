"""The part of a job description that says how text is made, for the job and for each row."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.engine.types import MAX_STOP_STRINGS


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _stop_strings(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return _listed(value)


_Text = Annotated[str, Field(min_length=1)]
_TokenId = Annotated[int, Field(ge=0, le=1 << 31)]
_MODE = ConfigDict(frozen=True, extra="forbid", strict=True)


class SamplingColumnsConfig(BaseModel):
    """Columns in which a row brings its own sampling options; null in one follows the job."""

    model_config = _MODE

    temperature: _Text | None = Field(None, description="Column with the row's temperature.")
    top_p: _Text | None = Field(None, description="Column with the row's top_p.")
    top_k: _Text | None = Field(None, description="Column with the row's top_k.")
    min_p: _Text | None = Field(None, description="Column with the row's min_p.")
    repetition_penalty: _Text | None = Field(None, description="Column with the row's repetition_penalty.")
    presence_penalty: _Text | None = Field(None, description="Column with the row's presence_penalty.")
    frequency_penalty: _Text | None = Field(None, description="Column with the row's frequency_penalty.")
    max_tokens: _Text | None = Field(None, description="Column with the row's max_tokens.")
    min_tokens: _Text | None = Field(None, description="Column with the row's min_tokens.")
    stop: _Text | None = Field(None, description="Column with the row's stop strings.")
    stop_token_ids: _Text | None = Field(None, description="Column with the row's stop token ids.")
    ignore_eos: _Text | None = Field(None, description="Column with the row's ignore_eos.")
    seed: _Text | None = Field(None, description="Column with the row's seed, which goes before the job's.")
    use_grammar: _Text | None = Field(None, description="Column with the row's use_grammar.")
    grammar: _Text | None = Field(None, description="Column with a GBNF grammar for the row's text.")
    json_schema: _Text | None = Field(None, description="Column with a JSON schema for the row's text, as JSON.")
    regex: _Text | None = Field(None, description="Column with a regular expression for the row's text.")
    truncate: _Text | None = Field(None, description="Column with the row's truncate.")
    soft_prompt: _Text | None = Field(None, description="Column with the name of the row's soft prompt.")


class SamplingConfig(BaseModel):
    """How the next token is chosen and when to stop. What is left out is the expert package's own default."""

    model_config = _MODE

    temperature: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="0 takes the most likely token; higher draws more freely."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Draw from the smallest set of tokens with at least this probability.",
    )
    top_k: int | None = Field(
        None, ge=0, le=1 << 31, description="Draw from this many most likely tokens; 0 draws from all."
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Leave out tokens less likely than this share of the most likely one.",
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=100,
        allow_inf_nan=False,
        description="Divides the score of tokens already seen; 1 changes nothing.",
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="Taken once from the score of every token generated so far.",
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="Taken from a token's score for each time it was generated so far.",
    )
    max_tokens: int | None = Field(
        None, ge=1, le=1 << 31, description="At most this many tokens are generated for a row."
    )
    min_tokens: int | None = Field(
        None, ge=0, le=1 << 31, description="Nothing ends a text before this many tokens, but its grammar."
    )
    stop: Annotated[tuple[_Text, ...], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_stop_strings)] | None = (
        Field(
            None,
            description="A string or a list of strings that end the text; they are cut from it.",
            json_schema_extra={"expected": f"a non-empty string or a list of at most {MAX_STOP_STRINGS} of them"},
        )
    )
    stop_token_ids: (
        Annotated[tuple[_TokenId, ...], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_listed)] | None
    ) = Field(
        None,
        description="Tokens that end the text; they are not part of it.",
        json_schema_extra={"expected": f"a list of at most {MAX_STOP_STRINGS} whole numbers from 0"},
    )
    ignore_eos: bool | None = Field(None, description="Whether to go on after the model's end token.")
    use_grammar: bool | None = Field(
        None, description="Whether the package's grammar constrains the text; true is an error when it cannot."
    )
    grammar: _Text | None = Field(None, description="A GBNF grammar that constrains the text.")
    json_schema: _Text | dict[str, Any] | None = Field(
        None,
        description="A JSON schema that constrains the text, as a mapping or as JSON.",
        json_schema_extra={"expected": "a JSON schema, as a mapping or as text"},
    )
    regex: _Text | None = Field(None, description="A regular expression that constrains the whole text.")
    truncate: Literal["left", "right"] | None = Field(
        None,
        description="Cut the oldest (left) or newest (right) tokens of a prompt that is too long; else it is an error.",
    )
    soft_prompt: _Text | None = Field(
        None, description="Name of the package's soft prompt to put before every prompt; left out, its only one."
    )
