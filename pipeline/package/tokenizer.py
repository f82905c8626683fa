"""Whether a package's tokenizer and chat template can be used: before any library reads them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import TokenizerError
from pipeline.package.adapter_weights import config_number
from pipeline.package.integrity import FileRecord
from pipeline.package.patterns import runs_away

CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"
MAX_CONFIG_BYTES = 32 << 20
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPLATE_CHARACTERS = 256 << 10
MAX_PATTERN_CHARACTERS = 4096
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
_HINT = "Save the tokenizer again with transformers' save_pretrained, without custom code, and pack the expert."


def check_tokenizer_config(root: Path, records: Mapping[str, FileRecord], *, source: str) -> None:
    """Refuse a tokenizer that names code of its own.

    Args:
        root: The unpacked package.
        records: Its files by path.
        source: The package, as messages name it.

    Raises:
        TokenizerError: `tokenizer_config.json` is not JSON, or names code to run.
    """
    config = _read(root, records, CONFIG_NAME, MAX_CONFIG_BYTES, source)
    named = [name for name in _CODE if config.get(name)]
    if named:
        raise TokenizerError(
            f"{CONFIG_NAME} in {source} names code to run, which is never done",
            hint=_HINT,
            details=[f"{name}: {str(config[name])[:200]}" for name in named],
        )


def check_tokenizer(root: Path, records: Mapping[str, FileRecord], *, source: str) -> None:
    """Refuse a tokenizer whose patterns could take time without end.

    Raises:
        TokenizerError: `tokenizer.json` is not JSON, or a pattern repeats what it repeats already.
    """
    tokenizer = _read(root, records, TOKENIZER_NAME, MAX_TOKENIZER_BYTES, source)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for pattern in _patterns(tokenizer.get(part), 0):
            if len(pattern) > MAX_PATTERN_CHARACTERS or runs_away(pattern):
                raise TokenizerError(
                    f"{TOKENIZER_NAME} in {source} splits text by a pattern that could take time without end",
                    hint=_HINT,
                    details=[f"{part}: {pattern[:200]}"],
                )


def check_chat_templates(root: Path, records: Mapping[str, FileRecord], *, source: str) -> None:
    """Refuse a chat template that is no template, is too long, or runs away with an ordinary conversation.

    Raises:
        TokenizerError: It is, or does.
    """
    from pipeline.package.template_trial import try_template  # it brings in jinja

    for place, text in _templates(root, records, source):
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            most = f"{MAX_TEMPLATE_CHARACTERS:,} are allowed"
            raise _template_error(source, place, f"it has {len(text):,} characters; {most}")
        problem = try_template(text)
        if problem is not None:
            raise _template_error(source, place, problem)


def check_fits_vocabulary(package_root: Path, base_path: Path, *, label: str) -> None:
    """Compare a package's own tokenizer with the base model it is for.

    Args:
        package_root: The unpacked package.
        base_path: The base model's directory.
        label: The package, as messages name it.

    Raises:
        TokenizerError: It has a token that the base model has no embedding for, or gives a control token another id.
    """
    mine = _token_ids(package_root)
    size = config_number(base_path, "vocab_size")
    if not mine:
        return
    last = max(mine, key=mine.__getitem__)
    if size is not None and mine[last] >= size:
        raise TokenizerError(
            f"the tokenizer of {label} does not fit the base model in {base_path}",
            hint="Pack the expert with the tokenizer of its base model.",
            details=[f"{last!r} has the id {mine[last]}, the base model has embeddings for {size}"],
        )
    theirs = _added_tokens(_json(base_path / TOKENIZER_NAME))
    changed = [token for token, number in theirs.items() if token in mine and mine[token] != number]
    if changed:
        raise TokenizerError(
            f"the tokenizer of {label} gives control tokens of the base model another meaning",
            hint="Pack the expert with the tokenizer of its base model.",
            details=[f"{token!r}: id {mine[token]}, in the base model {theirs[token]}" for token in changed[:8]],
        )


def _read(root: Path, records: Mapping[str, FileRecord], name: str, most: int, source: str) -> dict[str, Any]:
    record = records.get(name)
    if record is None:
        return {}
    if record.size > most:
        raise TokenizerError(f"{name} in {source} has {record.size:,} bytes", hint=f"It may have {most:,}.")
    try:
        value = json.loads((root / name).read_bytes())
    except (ValueError, RecursionError) as problem:
        raise TokenizerError(f"{name} in {source} is not valid JSON: {problem}", hint=_HINT) from problem
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} in {source} is no JSON object", hint=_HINT)
    return value


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _added_tokens(tokenizer: dict[str, Any]) -> dict[str, int]:
    listed = tokenizer.get("added_tokens")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return {str(entry.get("content")): entry["id"] for entry in entries if type(entry.get("id")) is int}


def _token_ids(root: Path) -> dict[str, int]:
    tokenizer = _json(root / TOKENIZER_NAME)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    known = (
        {token: number for token, number in vocabulary.items() if type(number) is int}
        if isinstance(vocabulary, dict)
        else {}
    )
    return known | _added_tokens(tokenizer)


def _patterns(value: Any, depth: int) -> Iterator[str]:
    """Every regular expression below a part of a tokenizer."""
    if depth > 16:
        return
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for inner in value.values():
            yield from _patterns(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner, depth + 1)


def _templates(root: Path, records: Mapping[str, FileRecord], source: str) -> Iterator[tuple[str, str]]:
    config = _read(root, records, CONFIG_NAME, MAX_CONFIG_BYTES, source)
    value = config.get("chat_template")
    named = value if isinstance(value, list) else [{"name": "default", "template": value}]
    for entry in named:
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            yield f"{CONFIG_NAME}: chat_template", entry["template"]
        elif value is not None:
            raise _template_error(source, f"{CONFIG_NAME}: chat_template", "it is no text")
    for path, record in records.items():
        if path == TEMPLATE_NAME or path.startswith("additional_chat_templates/"):
            if record.size > 4 * MAX_TEMPLATE_CHARACTERS:
                raise _template_error(source, path, f"it has {record.size:,} bytes")
            try:
                yield path, (root / path).read_text(encoding="utf-8")
            except UnicodeDecodeError as problem:
                raise _template_error(source, path, "it is not UTF-8") from problem


def _template_error(source: str, place: str, detail: str) -> TokenizerError:
    return TokenizerError(
        f"the chat template of {source} cannot be used",
        hint="Correct the template, or leave it out: then the base model's is used.",
        details=[f"{place}: {detail}"],
    )
