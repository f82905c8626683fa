"""The commands that ask experts: one prompt, or a conversation. Thin, like all commands."""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from pipeline.cli_common import (
    USAGE,
    USAGE_OF_GRAMMARS,
    BaseModelOption,
    PackageArgument,
    RollbackOption,
    StorageOption,
    Trust,
    TrustOption,
    errors_on_exit,
    printable,
    storage_options,
    text_or_file,
)
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.expert import Expert

DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; the best there is if not given.")]
QuantizationOption = Annotated[str | None, typer.Option(help="int8 or int4: weights of 8 or 4 bits.")]
SchemaOption = Annotated[str | None, typer.Option(help="The schema, as text; @FILE reads it from a file.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="At most this many tokens are generated.")]


def add_ask_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the program."""
    for command in (generate, chat, bench):
        app.command()(command)


def generate(
    package: PackageArgument,
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    schema: SchemaOption = None,
    dialect: Annotated[str | None, typer.Option(help="The query dialect; the expert's own if not given.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    base_model: BaseModelOption = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    max_tokens: MaxTokensOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="How many answers are drawn.")] = None,
    grammar: Annotated[bool | None, typer.Option(help="Hold the answer to the package's grammar.")] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="Hold the answer to a JSON schema; @FILE reads it from a file.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Hold the answer to a regular expression.")] = None,
    truncate: Annotated[
        str | None, typer.Option(help="left or right: cut a prompt that is too long at that side.")
    ] = None,
    trust: TrustOption = Trust.any,
    allow_rollback: RollbackOption = False,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    storage_option: StorageOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Answer one prompt; the text is printed as it comes.

    Example: expert generate expert-sql.expert "List the name of all users." --schema @schema.sql

    Example: expert generate pipeline/demo/artifacts/expert-sql-*.expert "List the name of all users."
    --schema "CREATE TABLE users (name TEXT);" --base-model pipeline/demo/artifacts/demo-qwen3-2m

    Example: echo "Omar turned 45." | expert generate expert-json.expert - --json
    """
    tells_grammar = grammar or json_schema is not None or regex is not None
    with errors_on_exit("interrupted", usage=USAGE_OF_GRAMMARS if tells_grammar else USAGE):
        question = sys.stdin.read() if prompt == "-" else prompt
        options: dict[str, Any] = {
            "schema": text_or_file(schema),
            "dialect": dialect,
            "system": system,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "stop": stop,
            "seed": seed,
            "n": n,
            "use_grammar": grammar,
            "json_schema": text_or_file(json_schema),
            "regex": regex,
            "truncate": cast(Literal["left", "right"] | None, truncate),
        }
        placing = {"device": device, "base_model": base_model, "quantization": quantization}
        with _expert(package, trust, allow_rollback, storage_option, placing) as expert:
            if as_json:
                result = expert.generate(question, **options)
                typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
            elif (n or 1) > 1:
                typer.echo("\n".join(map(printable, expert.generate(question, **options).texts)))
            else:
                with closing(expert.generate_stream(question, **options)) as stream:
                    for piece in stream:
                        typer.echo(printable(piece), nl=False)
                        sys.stdout.flush()
                typer.echo()


def _expert(
    package: str,
    trust: Trust,
    allow_rollback: bool,
    storage_option: list[str] | None,
    placing: dict[str, Any],
) -> "Expert":
    """The expert that a command asks."""
    from pipeline.expert import Expert

    places = storage_options(storage_option)
    return Expert.load(package, trust=trust.value, allow_rollback=allow_rollback, storage_options=places, **placing)


def chat(
    packages: Annotated[list[str], typer.Argument(help="Expert packages; the first answers until /expert.")],
    schema: SchemaOption = None,
    base_model: BaseModelOption = None,
    max_tokens: MaxTokensOption = None,
    trust: TrustOption = Trust.any,
    allow_rollback: RollbackOption = False,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    storage_option: StorageOption = None,
    history: Annotated[Path | None, typer.Option(help="Keep what you type in this file, for the next time.")] = None,
) -> None:
    """Talk with experts in the terminal, or from lines on standard input. /help lists what can be typed.

    Example: expert chat expert-sql.expert expert-json.expert --schema @schema.sql
    """
    with errors_on_exit("interrupted"):
        from pipeline.chat_session import ChatSession, converse, typed_lines
        from pipeline.manager import ExpertManager

        is_typed = sys.stdin.isatty()
        lines = typed_lines(history) if is_typed else (line.rstrip("\n") for line in sys.stdin)
        places = storage_options(storage_option)
        with ExpertManager(
            device=device, base_model=base_model, quantization=quantization, storage_options=places
        ) as manager:
            for package in packages:
                name = _load(manager, package, trust, allow_rollback, places)
                if is_typed:
                    typer.echo(f"{name} is loaded")
            session = ChatSession(manager, schema=text_or_file(schema), max_tokens=max_tokens)
            converse(session, lines, lambda text: typer.echo(printable(text), nl=False))


def _load(manager: Any, package: str, trust: Trust, allow_rollback: bool, places: dict[str, Any]) -> str:
    """Load an expert under the name in its manifest."""
    from pipeline.package import open_package

    asked: dict[str, Any] = {"trust": trust.value, "allow_rollback": allow_rollback}
    name = open_package(package, storage_options=places, **asked).manifest.name
    if name in manager.experts:
        raise ConfigError(f"two packages are called {name}", hint="Give one of them.")
    manager.load_expert(name, package, **asked)
    return name


def bench(
    package: PackageArgument,
    prompt: Annotated[str, typer.Option(help="What is asked.")] = "List all users.",
    schema: SchemaOption = None,
    base_model: BaseModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer, exactly.", min=1)] = 64,
    batches: Annotated[str, typer.Option(help="How many prompts at a time, by commas.")] = "1,8,32",
    trust: TrustOption = Trust.any,
    allow_rollback: RollbackOption = False,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    storage_option: StorageOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure how fast an expert answers here: one prompt, and many at a time.

    Example: expert bench expert-sql.expert --schema @schema.sql --batches 1,16,128
    """
    with errors_on_exit("interrupted"):
        from dataclasses import asdict

        from rich.console import Console

        from pipeline.cli_tables import print_table
        from pipeline.speed import measure_speed

        try:
            sizes = [int(size) for size in batches.split(",")]
        except ValueError as error:
            raise ConfigError(f"--batches {batches!r} is not numbers", hint="Write for example 1,8,32.") from error
        if min(sizes) < 1:
            raise ConfigError(f"--batches {batches!r} has a number below 1", hint="Write for example 1,8,32.")
        placing = {"device": device, "base_model": base_model, "quantization": quantization}
        with _expert(package, trust, allow_rollback, storage_option, placing) as expert:
            text = text_or_file(schema)
            speeds = list(measure_speed(expert, prompt, schema=text, max_tokens=max_tokens, batches=sizes))
        if as_json:
            typer.echo(json.dumps([asdict(speed) for speed in speeds], indent=2))
            return
        rows = [
            (
                f"{speed.num_prompts:,}",
                f"{speed.seconds:,.2f}",
                f"{speed.first_token_seconds * 1000:,.0f} ms",
                f"{speed.prompts_per_second:,.1f}",
                f"{speed.tokens_per_second:,.0f}",
            )
            for speed in speeds
        ]
        print_table(("prompts", "seconds", "first token", "prompts/s", "tokens/s"), rows, Console())
