"""The job description: its rules, the places of its errors, its overrides, and the example that is shipped."""

import dataclasses
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipeline.batch.columns import ResolvedColumns, resolve_columns
from pipeline.batch.config import BatchConfig, ColumnsConfig
from pipeline.batch.config_file import MAX_COMPLAINTS, MAX_FILE_BYTES, load_config
from pipeline.batch.sampling_config import SamplingColumnsConfig, SamplingConfig
from pipeline.engine.requests import OPTION_NAMES
from pipeline.engine.types import SamplingParams
from pipeline.errors import ConfigError, DatasetError, InvalidRequestError

EXAMPLE = Path(__file__).parents[2] / "configs" / "batch.yaml"
REQUIRED: dict[str, Any] = {"dataset": "in.parquet", "expert": "sql.expert", "output": "out"}
HEAD = "dataset: in.parquet\nexpert: sql.expert\noutput: out\n"  # lines 1 to 3
ROLES = ("prompt", "messages", "id", "schema", "system", "dialect", "expected", "expert")
SECTIONS: dict[str, type[BaseModel]] = {"": BatchConfig, "columns.": ColumnsConfig, "sampling.": SamplingConfig}

Write = Callable[[str], Path]


def key_names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def problems(given_options: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        BatchConfig.from_options(**given_options)
    return list(caught.value.details)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_text(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def file_problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return list(caught.value.details)


# ---- the rules ----


def test_defaults() -> None:
    config = BatchConfig.from_options(**REQUIRED)
    shown = {name: value for name, value in config.model_dump().items() if not isinstance(value, dict)}
    assert {name: value for name, value in shown.items() if value is not None} == {
        **REQUIRED,
        "trust": "any",
        "allow_rollback": False,
        "hive_partitions": True,
        "max_decompressed_bytes": 256 * 1024 * 1024,
        "openai_models": "named",
        "output_prefix": "",
        "seed": 0,
        "shard_rows": 256,
        "engine": "packed",
        "prepare": "auto",
        "quantization": "none",
        "overwrite": False,
        "retry_errors": False,
        "lease_seconds": 60.0,
        "parquet_compression": "zstd",
        "progress_seconds": 5.0,
        "progress_timeout": 600.0,
    }
    assert config.columns == ColumnsConfig()
    assert config.sampling == SamplingConfig()
    assert config.models == config.storage_options == {}


@pytest.mark.parametrize("model", SECTIONS.values())
def test_every_field_is_described(model: type[BaseModel]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_config_is_frozen() -> None:
    config = BatchConfig.from_options(**REQUIRED)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


def test_python_values_are_taken() -> None:
    config = BatchConfig.from_options(
        dataset=(Path("a"), "b"),
        expert=Path("sql.expert"),
        output=Path("out"),
        columns={"prompt": "question", "schema": "ddl"},
        sampling=SamplingConfig(temperature=1, stop=";"),
        models={"Qwen3-0.6B": Path("/models/q")},
        num_gpus=2,
        num_cpus=0.5,
    )
    assert (config.dataset, config.expert, config.output) == (["a", "b"], "sql.expert", "out")
    assert (config.columns.prompt, config.columns.schema_) == ("question", "ddl")
    assert config.sampling.stop == (";",)
    assert config.models == {"Qwen3-0.6B": "/models/q"}


def test_missing_options_are_all_named() -> None:
    assert problems({}) == [
        "dataset: missing; expected a path, glob pattern or URL, or a list of them",
        "expert: missing; expected a path or URL of a package",
        "output: missing; expected a folder or URL",
    ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dataset": []}, "dataset: expected a path, glob pattern or URL, or a list of them, got an empty list"),
        ({"dataset": 5}, "dataset: expected a path, glob pattern or URL, or a list of them, got 5"),
        ({"dataset": ["a", ""]}, 'dataset[1]: expected a non-empty string, got ""'),
        ({"format": "parquett"}, 'format: expected "parquet", "jsonl", "csv", "arrow" or "openai", got "parquett"'),
        ({"prepare": "driver"}, 'prepare: expected "auto", "tasks" or "worker", got "driver"'),
        ({"max_decompressed_bytes": 0}, "max_decompressed_bytes: expected a whole number of at least 1, got 0"),
        ({"hive_partitions": "no"}, 'hive_partitions: expected true or false, got "no"'),
        ({"prompt_template": 3}, "prompt_template: expected a text with names of columns in braces, got 3"),
        ({"expert": None}, "expert: missing; expected a path or URL of a package"),
        ({"expert": None, "experts": {}}, "expert: missing; expected a path or URL of a package"),
        ({"num_workers": 3, "max_workers": 2}, "max_workers: expected at least num_workers, which is 3, got 2"),
        ({"max_error_rate": 1.5}, "max_error_rate: expected a number from 0 to 1, got 1.5"),
        ({"output": ""}, 'output: expected a folder or URL, got ""'),
        ({"output_format": "csv"}, 'output_format: expected "parquet", "jsonl" or "openai", got "csv"'),
        ({"output_format": "openai"}, "output_format: only for format openai"),
        ({"openai_models": "any", "format": "jsonl"}, "openai_models: only for format openai"),
        ({"openai_models": "all"}, 'openai_models: expected "named" or "any", got "all"'),
        (
            {"format": "openai", "output_format": "jsonl"},
            "output_format: not for format openai, whose lines have a form of their own",
        ),
        (
            {"format": "openai", "prompt_template": "{body}"},
            "prompt_template: not for format openai, whose lines have a form of their own",
        ),
        (
            {"format": "openai", "retry_errors": True},
            "retry_errors: not for format openai: give the lines to be asked again in a file of their own",
        ),
        (
            {"format": "openai", "openai_models": "any", "expert": None, "experts": {"a": "a.expert"}},
            "openai_models: any needs `expert`, which answers for the other models",
        ),
        (
            {"format": "openai", "output_prefix": "a"},
            "output_prefix: not for format openai, whose lines have a form of their own",
        ),
        (
            {"format": "openai", "columns": {"prompt": "body"}},
            "columns: not for format openai, whose lines have a form of their own",
        ),
        (
            {"output_prefix": "../a"},
            "output_prefix: expected a string of at most 100 letters, digits, '.', '_' and '-', the first no '.' or "
            "'-', got \"../a\"",
        ),
        ({"models": ["a"]}, "models: expected a mapping, got a list of 1"),
        (
            {"models": {"a": 1}},
            "models.a: expected a non-empty string, got 1; to mean a string, put it in quotes",
        ),
        ({"seed": -1}, "seed: expected a whole number from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, f"seed: expected a whole number from 0 to {2**64 - 1}, got {2**64}"),
        ({"seed": 16**9999}, f"seed: expected a whole number from 0 to {2**64 - 1}, got a number of 39997 bits"),
        ({"seed": 1.0}, f"seed: expected a whole number from 0 to {2**64 - 1}, got 1.0"),
        ({"shard_rows": 0}, "shard_rows: expected a whole number from 1 to 1000000, got 0"),
        ({"shard_rows": 1_000_001}, "shard_rows: expected a whole number from 1 to 1000000, got 1000001"),
        ({"num_workers": 0}, "num_workers: expected a whole number of at least 1, got 0"),
        ({"num_workers": True}, "num_workers: expected a whole number of at least 1, got true"),
        ({"num_gpus": 1.5}, "num_gpus: expected a number from 0 to 1, or a whole number, got 1.5"),
        ({"num_cpus": -1}, "num_cpus: expected a number from 0 to 1, or a whole number, got -1"),
        ({"num_cpus": float("inf")}, "num_cpus: expected a number from 0 to 1, or a whole number, got inf"),
        ({"batch_size": "32"}, 'batch_size: expected a whole number of at least 1, got "32"'),
        ({"max_batch_tokens": 0}, "max_batch_tokens: expected a whole number of at least 1, got 0"),
        ({"device": ""}, 'device: expected auto, cpu, cuda, cuda:1 or mps, got ""'),
        ({"base_model": ""}, 'base_model: expected a non-empty string, got ""'),
        ({"dtype": "float8"}, 'dtype: expected "float32", "bfloat16" or "float16", got "float8"'),
        ({"storage_options": "x"}, 'storage_options: expected a mapping, got "x"'),
        ({"progress_seconds": 0}, "progress_seconds: expected a number above 0, got 0"),
        ({"price_per_hour": -1}, "price_per_hour: expected a number of at least 0, got -1"),
        ({"progress_seconds": float("nan")}, "progress_seconds: expected a number above 0, got nan"),
        (
            {"columns": ["prompt"]},
            "columns: expected a mapping with the keys prompt, messages, id, schema, system, dialect, expected, "
            "expert, sampling, got a list of 1",
        ),
        ({"sampling": {"top_p": 0}}, "sampling.top_p: expected a number above 0 and at most 1, got 0"),
        ({"sampling": {"temperature": "0.5"}}, 'sampling.temperature: expected a number from 0 to 100, got "0.5"'),
        (
            {"sampling": {"stop": ""}},
            'sampling.stop: expected a non-empty string or a list of at most 64 of them, got ""',
        ),
        ({"sampling": {"stop": ["a", ""]}}, 'sampling.stop[1]: expected a non-empty string, got ""'),
        (
            {"sampling": {"stop": ["a"] * 65}},
            "sampling.stop: expected a non-empty string or a list of at most 64 of them, got a list of 65",
        ),
        ({"sampling": {"use_grammar": 1}}, "sampling.use_grammar: expected true or false, got 1"),
        ({"temprature": 1}, "temprature: unknown key; did you mean `sampling.temperature`?"),
        ({"temperature": 1}, "temperature: unknown key; did you mean `sampling.temperature`?"),
        ({"sampling": {"seed": 1}}, "sampling.seed: unknown key; did you mean `seed`?"),
        ({"columns": {"schema_": "ddl"}}, "columns.schema_: unknown key; did you mean `schema`?"),
        (
            {"columns": {"zzz": "q"}},
            "columns.zzz: unknown key; expected one of prompt, messages, id, schema, system, dialect, expected, "
            "expert, sampling",
        ),
    ],
)
def test_wrong_option(options: dict[str, Any], problem: str) -> None:
    assert problems(REQUIRED | options) == [problem]


@pytest.mark.parametrize("section", ["columns", "sampling", "models", "storage_options"])
def test_empty_section_is_the_default(section: str) -> None:
    assert BatchConfig.from_options(**REQUIRED, **{section: None}) == BatchConfig.from_options(**REQUIRED)


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(2**31 - 2, 2**31 + 2),
    st.floats(),
    st.floats(-1, 101),
    st.booleans(),
    st.text(max_size=2),
)


@given(
    st.sampled_from(
        [
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "max_tokens",
        ]
    ),
    NUMBERS,
)
def test_sampling_accepts_what_the_engine_accepts(name: str, value: Any) -> None:
    try:
        SamplingParams(**{name: value})
    except InvalidRequestError:
        with pytest.raises(ValidationError):
            SamplingConfig(**{name: value})
    else:
        assert getattr(SamplingConfig(**{name: value}), name) == value


@given(
    st.one_of(
        st.text(max_size=2), st.lists(st.text(max_size=2), max_size=3), st.lists(st.just("a"), min_size=60, max_size=68)
    )
)
def test_stop_accepts_what_the_engine_accepts(value: Any) -> None:
    try:
        wanted = SamplingParams(stop=value).stop
    except InvalidRequestError:
        with pytest.raises(ValidationError):
            SamplingConfig(stop=value)
    else:
        assert SamplingConfig(stop=value).stop == wanted


def test_sampling_has_the_options_of_the_engine() -> None:
    # The job has its own seed, and a row of the output has place for one answer without its probabilities.
    assert {*SamplingConfig.model_fields} == {*OPTION_NAMES} - {"seed", "n", "logprobs"}
    assert {*SamplingColumnsConfig.model_fields} == {*SamplingConfig.model_fields} | {"seed"}


# ---- misspelt keys ----


def one_edit(word: str) -> st.SearchStrategy[str]:
    places, letters = st.integers(0, len(word) - 1), st.sampled_from(string.ascii_lowercase + "_")
    return st.one_of(
        places.map(lambda at: word[:at] + word[at + 1 :]),
        st.tuples(places, letters).map(lambda edit: word[: edit[0]] + edit[1] + word[edit[0] :]),
        st.tuples(places, letters).map(lambda edit: word[: edit[0]] + edit[1] + word[edit[0] + 1 :]),
        places.map(lambda at: word[:at] + word[at : at + 2][::-1] + word[at + 2 :]),
    )


def letters_apart(first: str, second: str) -> int:
    """Letters of the longer word that are not in the other, in order: an oracle that knows nothing of difflib."""
    row = [0] * (len(second) + 1)
    for letter in first:
        above = row[:]
        for at, other in enumerate(second, start=1):
            row[at] = above[at - 1] + 1 if letter == other else max(above[at], row[at - 1])
    return max(len(first), len(second)) - row[-1]


@given(st.data())
def test_one_misspelt_letter_suggests_the_right_key(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(list(SECTIONS)))
    names = [name for name in key_names(SECTIONS[section]) if len(name) > 3]
    right = data.draw(st.sampled_from(names))
    wrong = data.draw(one_edit(right))
    assume(not any(wrong in key_names(model) for model in SECTIONS.values()))
    assume(all(letters_apart(wrong, name) > 1 for name in key_names(SECTIONS[section]) if name != right))
    options = {section[:-1]: {wrong: 1}} if section else {wrong: 1}
    assert f"{section}{wrong}: unknown key; did you mean `{right}`?" in problems(REQUIRED | options)


# ---- the file ----


def test_rendered_error(write: Write) -> None:
    path = write(HEAD + "seed: 3\nsampling:\n  # colder\n  temprature: 0.1\n\nnum_workers: two\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"{path} is not valid\n"
        "  line 7, column 3  sampling.temprature: unknown key; did you mean `temperature`?\n"
        '  line 9, column 14  num_workers: expected a whole number of at least 1, got "two"\n'
        "  Fix: correct the lines above; configs/batch.yaml in the project lists every key"
    )
    assert isinstance(caught.value.__cause__, ValidationError)


def test_all_problems_come_at_once_in_the_order_of_lines(write: Write) -> None:
    path = write(
        "dataset: [a.parquet, 5]\n"
        "expert: !env EXPERT\n"
        "num_gpu: 1\n"
        "seed: 1\n"
        "seed: 2\n"
        "columns:\n"
        "  prompt: true\n"
        "  1: x\n"
        "models: {Qwen3-0.6B: 3}\n"
        "shard_rows: 2024-01-01\n"
        "storage_options: !!set {a}\n"
        "progress_seconds: !!float abc\n"
    )
    assert file_problems(path) == [
        "line 1, column 1  output: missing; expected a folder or URL",
        "line 1, column 22  dataset[1]: expected a non-empty string, got 5; to mean a string, put it in quotes",
        "line 2, column 9  expert: the tag !env is not supported",
        "line 3, column 1  num_gpu: unknown key; did you mean `num_gpus`?",
        "line 5, column 1  seed: given twice; the first is on line 4, column 1",
        "line 7, column 11  columns.prompt: expected a non-empty string, got true; to mean a string, put it in quotes",
        "line 8, column 3  columns.1: expected a key that is a string; put it in quotes",
        "line 9, column 22  models.Qwen3-0.6B: expected a non-empty string, got 3; to mean a string, put it in quotes",
        'line 10, column 13  shard_rows: expected a whole number from 1 to 1000000, got "2024-01-01"',
        "line 11, column 18  storage_options: the tag tag:yaml.org,2002:set is not supported",
        "line 12, column 19  progress_seconds: abc cannot be read as float",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: b: c", "line 1, column 5  not valid YAML: mapping values are not allowed here"),
        (
            HEAD + "\tseed: 1",
            r"line 4, column 1  not valid YAML: while scanning for the next token, found character '\t' that cannot "
            "start any token",
        ),
        (
            "dataset: *.parquet",
            "line 1, column 11  not valid YAML: while scanning an alias, expected alphabetic or numeric character, but "
            "found '.'; a value that begins with * must be in quotes",
        ),
        (
            "a: &x 1\nb: *x",
            "line 2, column 4  not valid YAML: aliases (*name) are not supported; a value that begins with * must be "
            "in quotes",
        ),
        (
            "--- a\n--- b",
            "line 2, column 1  not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("a: 1\nb: x\x01", r"line 2, column 5  the character \x01 cannot stand in YAML"),
        ("- a", "line 1, column 1  expected keys and values, such as `dataset: questions.parquet`"),
        ("# \n\njust text", "line 3, column 1  expected keys and values, such as `dataset: questions.parquet`"),
        ("!!set {a}", "line 1, column 1  the tag tag:yaml.org,2002:set is not supported"),
        (HEAD + 'base_model: "\\ud800"', "line 4, column 13  base_model: holds half of a character (a lone surrogate)"),
        (HEAD + "? [a]\n: 1", "line 4, column 3  ?: expected a key that is a string; put it in quotes"),
        (HEAD + "seed: " + "9" * 5000, f"line 4, column 7  seed: {'9' * 57}... cannot be read as int"),
    ],
)
def test_file_that_cannot_be_read_as_a_configuration(write: Write, text: str, problem: str) -> None:
    assert file_problems(write(text)) == [problem]


def test_merge_key_is_a_key_like_any_other(write: Write) -> None:
    (problem,) = file_problems(write(HEAD + "<<: {seed: 1}"))
    assert problem.startswith("line 4, column 1  <<: unknown key; expected one of dataset, ")


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_endless_nesting_is_refused(write: Write, opening: str) -> None:
    (problem,) = file_problems(write(opening * (MAX_FILE_BYTES // len(opening))))
    assert re.fullmatch(r"line 1, column \d+  not valid YAML: nested too deeply", problem)


def test_very_many_problems_are_counted(write: Write) -> None:
    found = file_problems(write(HEAD + "".join(f"key{number}: 1\n" for number in range(2000))))
    assert len(found) == MAX_COMPLAINTS + 1
    assert found[0].startswith("line 4, column 1  key0: unknown key")
    assert found[-1] == "and 1950 more"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"dataset: a\nexpert: caf\xe9\n")
    assert file_problems(path) == ["line 2, column 12  not UTF-8 text"]


def test_byte_order_mark_does_not_move_columns(write: Write) -> None:
    assert file_problems(write("\ufeffsed: 1\n" + HEAD)) == ["line 1, column 1  sed: unknown key; did you mean `seed`?"]


def test_missing_file_names_the_nearest(tmp_path: Path, write: Write) -> None:
    write(HEAD)
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_config(tmp_path / "jbo.yaml")
    assert caught.value.details == (f"near it: {tmp_path / 'job.yaml'}",)
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_config(tmp_path / "nowhere" / "job.yaml")
    assert caught.value.details == (f"there is no folder {tmp_path / 'nowhere'}",)
    (tmp_path / ".hidden.yaml").touch()
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_config(tmp_path / "quite-another.yaml")
    assert caught.value.details == (f"near it: {tmp_path / 'job.yaml'}",)


def test_folder_huge_file_and_bad_name_are_refused(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="larger than 64 KiB"):
        load_config(write("#" * (MAX_FILE_BYTES + 1)))
    with pytest.raises(ConfigError, match="null byte"):
        load_config("a\0b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5E1", 50.0),
        (".5", 0.5),
        ("1", 1.0),
        ("1.", 1.0),
        ("+1.5", 1.5),
        ("1_0.5", 10.5),
        ("2.5e+1", 25.0),
    ],
)
def test_numbers_are_read_as_people_write_them(write: Write, text: str, value: float) -> None:
    assert load_config(write(HEAD + f"sampling: {{temperature: {text}}}\n")).sampling.temperature == value


def test_strings_are_kept_as_written(write: Write) -> None:
    path = write("dataset: ./$HOME/~/a.parquet\nexpert: 2024-01-01\noutput: ../out\nbase_model: 1.2.3\n")
    config = load_config(path)
    assert (config.dataset, config.expert, config.output) == ("./$HOME/~/a.parquet", "2024-01-01", "../out")
    assert config.base_model == "1.2.3"


SAFE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(
    st.fixed_dictionaries(
        {"dataset": SAFE_TEXT | st.lists(SAFE_TEXT, min_size=1, max_size=3), "expert": SAFE_TEXT, "output": SAFE_TEXT},
        optional={
            "seed": st.integers(0, 2**64 - 1),
            "num_gpus": st.floats(0, 1),
            "columns": st.dictionaries(st.sampled_from(ROLES), SAFE_TEXT),
            "sampling": st.fixed_dictionaries({}, optional={"temperature": st.floats(0, 100), "stop": SAFE_TEXT}),
            "models": st.dictionaries(SAFE_TEXT, SAFE_TEXT, max_size=3),
        },
    )
)
def test_a_file_says_the_same_as_options(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "same.yaml"
    path.write_text(yaml.safe_dump(options, default_style='"'), encoding="utf-8")
    assert load_config(path) == BatchConfig.from_options(**options)


@given(st.binary(max_size=200) | st.text(st.sampled_from("ab:-[]{}\"'#&*!|>? \n\t1.\ufeff")).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.details
    assert all(re.match(r"line \d+, column \d+  |and \d+ more", detail) for detail in caught.value.details)


# ---- overrides ----


def test_overrides_replace_and_add(write: Write) -> None:
    path = write(HEAD + "seed: 1\nformat: csv\nsampling:\ncolumns: {prompt: q, id: n}\n")
    config = load_config(
        path,
        [
            "dataset=**/*.parquet",
            "seed=2",
            "seed=3",
            "format=",
            "sampling.temperature=1e-2",
            "sampling.stop=[';', \"\\n\"]",
            "columns.prompt=question",
            "models.Qwen3-0.6B=/models/q",
            "storage_options.client_kwargs.endpoint_url=http://localhost:9000/?a=b",
            "output_prefix=2024-01-01",
            "base_model='1'",
        ],
    )
    assert (config.dataset, config.seed, config.format) == ("**/*.parquet", 3, None)
    assert (config.sampling.temperature, config.sampling.stop) == (0.01, (";", "\n"))
    assert (config.columns.prompt, config.columns.id) == ("question", "n")
    assert config.models == {"Qwen3-0.6B": "/models/q"}
    assert config.storage_options == {"client_kwargs": {"endpoint_url": "http://localhost:9000/?a=b"}}
    assert (config.output_prefix, config.base_model) == ("2024-01-01", "1")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "override seed  expected key=value, such as sampling.temperature=0.2"),
        ("=3", "override =3  expected key=value, such as sampling.temperature=0.2"),
        ("sampling..x=3", "override sampling..x=3  expected key=value, such as sampling.temperature=0.2"),
        (
            "sampling.temprature=0.2",
            "override sampling.temprature=0.2  sampling.temprature: unknown key; did you mean `temperature`?",
        ),
        (
            "num_workers=two",
            'override num_workers=two  num_workers: expected a whole number of at least 1, got "two"',
        ),
        ("smpling.top_k=1", "override smpling.top_k=1  smpling: unknown key; did you mean `sampling`?"),
        ("expert.a=1", "override expert.a=1  expert.a: cannot be set, as `expert` is not a mapping"),
        (
            "sampling={top_k: -1}",
            "override sampling={top_k: -1}  sampling.top_k: expected a whole number from 0 to 2147483648, got -1",
        ),
        ("columns={id: a, id: b}", "override columns={id: a, id: b}  columns.id: given twice"),
        (
            "dataset=[ab]*.parquet",
            "override dataset=[ab]*.parquet  dataset: not valid YAML: while scanning an alias, expected alphabetic or "
            "numeric character, but found '.'; a value that begins with * must be in quotes; to mean a string, put it "
            "in quotes inside the shell's",
        ),
        (
            "storage_options.secret=[hunter2",
            "override storage_options.secret=...  storage_options.secret: not valid YAML: while parsing a flow "
            "sequence, expected ',' or ']', but got '<stream end>'; to mean a string, put it in quotes inside the "
            "shell's",
        ),
    ],
)
def test_wrong_override_is_named(write: Write, override: str, problem: str) -> None:
    path = write(HEAD)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert list(caught.value.details) == [problem]
    assert caught.value.message == f"the overrides of {path} are not valid"
    assert caught.value.hint.startswith("correct the overrides above")


def test_override_mends_the_value_it_replaces(write: Write) -> None:
    path = write(HEAD + "num_workers: two\nseed: one\n")
    assert file_problems(path, "num_workers=2", "shard_rows=0") == [
        'line 5, column 7  seed: expected a whole number from 0 to 18446744073709551615, got "one"',
        "override shard_rows=0  shard_rows: expected a whole number from 1 to 1000000, got 0",
    ]
    assert load_config(path, ["num_workers=2", "seed=1"]).num_workers == 2


def test_override_of_an_unreadable_value_is_judged_itself(write: Write) -> None:
    assert file_problems(write(HEAD + "num_workers: !n 2\n"), "num_workers=0") == [
        "line 4, column 14  num_workers: the tag !n is not supported",
        "override num_workers=0  num_workers: expected a whole number of at least 1, got 0",
    ]


@given(st.text())
def test_any_override_is_taken_or_named(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "override.yaml"
    path.write_text(HEAD, encoding="utf-8")
    written = text[1:-1] if text[:1] in {"'", '"'} else text
    problems: tuple[str, ...] = ()
    base_model: str | None = written
    try:
        base_model = load_config(path, [f"base_model={text}"]).base_model
    except ConfigError as error:
        problems = error.details
    assert base_model in {written, None}
    assert all(problem.startswith("override base_model=") for problem in problems)


# ---- the example ----


def test_example_is_valid_and_shows_the_defaults() -> None:
    config = load_config(EXAMPLE)
    defaults = BatchConfig.from_options(**REQUIRED)
    assert config == defaults.model_copy(update={name: getattr(config, name) for name in REQUIRED})


def test_example_with_everything_switched_on_is_valid_and_has_every_key(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    text = re.sub(r"^( *)#(?=[A-Za-z])", r"\1", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")
    load_config(path)
    values = yaml.safe_load(text)
    assert sorted(values) == sorted(key_names(BatchConfig))
    assert sorted(values["columns"]) == sorted(key_names(ColumnsConfig))
    assert sorted(values["sampling"]) == sorted(key_names(SamplingConfig))
    assert values["models"]
    assert values["storage_options"]


@pytest.mark.parametrize("options", [{}, {"output_format": "openai"}, {"openai_models": "any"}, {"columns": None}])
def test_batch_files_of_openai_are_a_format_in_and_out(options: dict[str, Any]) -> None:
    config = BatchConfig.from_options(**REQUIRED, format="openai", **options)
    assert config.output_format == options.get("output_format")


def test_the_example_for_batch_files_is_valid(tmp_path: Path) -> None:
    config = load_config(EXAMPLE.with_name("openai-batch.yaml"))
    assert (config.format, config.openai_models) == ("openai", "named")
    assert Path(config.expert).name.startswith("expert-sql-")


# ---- columns ----


def roles(**columns: str) -> ResolvedColumns:
    names = [field.name for field in dataclasses.fields(ResolvedColumns) if field.name != "sampling"]
    return ResolvedColumns(**(dict.fromkeys(names) | columns))


def test_roles_are_the_columns() -> None:
    assert key_names(ColumnsConfig) == [field.name for field in dataclasses.fields(ResolvedColumns)]


@pytest.mark.parametrize(
    ("named", "available", "resolved"),
    [
        ({}, ["prompt"], roles(prompt="prompt")),
        ({}, ["x", "messages", "id", "schema"], roles(messages="messages", id="id", schema="schema")),
        ({}, ["prompt", "messages"], roles(prompt="prompt", messages="messages")),
        ({"prompt": "q", "schema": "ddl"}, ["q", "ddl", "prompt"], roles(prompt="q", schema="ddl")),
        ({"prompt": "q"}, ["q", "messages"], roles(prompt="q")),
        ({"messages": "chat"}, ["chat", "prompt"], roles(messages="chat")),
        ({"prompt": "q", "messages": "chat"}, ["chat", "q"], roles(prompt="q", messages="chat")),
    ],
)
def test_columns_are_found(named: dict[str, str], available: list[str], resolved: ResolvedColumns) -> None:
    assert resolve_columns(ColumnsConfig(**named), available) == resolved


def test_missing_columns_are_named_with_the_nearest() -> None:
    with pytest.raises(DatasetError) as caught:
        resolve_columns(ColumnsConfig(prompt="qestion", schema="zzz", id="n"), ["question", "n"])
    assert str(caught.value) == (
        "the dataset has no column 'qestion', 'zzz'\n"
        "  columns.prompt: no column 'qestion'; did you mean 'question'?\n"
        "  columns.schema: no column 'zzz'\n"
        "  Fix: name columns that the dataset has: question, n"
    )


@pytest.mark.parametrize(
    ("available", "listed"),
    [(["text", "id"], "text, id"), ([f"c{n}" for n in range(50)], "c39, and 10 more")],
)
def test_dataset_without_prompts_is_refused(available: list[str], listed: str) -> None:
    with pytest.raises(DatasetError, match="neither a column `prompt` nor a column `messages`") as caught:
        resolve_columns(ColumnsConfig(), available)
    assert caught.value.details[0].endswith(listed)


def test_an_empty_dataset_is_told_to_be_one() -> None:
    for named in (ColumnsConfig(), BatchConfig.from_options(**REQUIRED, columns={"prompt": "question"}).columns):
        with pytest.raises(DatasetError, match="the dataset is empty: it has no columns"):
            resolve_columns(named, [])


@pytest.mark.parametrize(
    ("header", "told"), [("id;prompt", "semicolons"), ("id\tprompt", "tabs"), ("id|prompt", "bars"), ("id", None)]
)
def test_a_csv_with_other_separators_is_told_to_have_them(header: str, told: str | None) -> None:
    with pytest.raises(DatasetError, match="neither a column") as caught:
        resolve_columns(ColumnsConfig(), [header])
    assert ("write the CSV with commas" in caught.value.hint) == (told is not None)
    assert told is None or told in caught.value.hint


def test_a_batch_file_of_openai_is_told_to_be_one() -> None:
    with pytest.raises(DatasetError, match="neither a column `prompt` nor a column `messages`") as caught:
        resolve_columns(ColumnsConfig(), ["custom_id", "method", "url", "body"])
    assert "set format: openai" in caught.value.hint


def test_a_row_may_bring_its_own_sampling_options() -> None:
    columns = BatchConfig.from_options(**REQUIRED, columns={"sampling": {"max_tokens": "limit"}}).columns
    assert resolve_columns(columns, ["prompt", "limit"]).sampling == {"max_tokens": "limit"}
    assert resolve_columns(ColumnsConfig(), ["prompt", "max_tokens"]).sampling == {}, "only when it is asked for"
    with pytest.raises(DatasetError) as caught:
        resolve_columns(columns, ["prompt", "limits"])
    assert caught.value.details == ("columns.sampling.max_tokens: no column 'limit'; did you mean 'limits'?",)
    with pytest.raises(ConfigError) as unknown:
        BatchConfig.from_options(**REQUIRED, columns={"sampling": {"max_token": "limit"}})
    assert "max_token" in unknown.value.details[0]
    assert "max_tokens" in unknown.value.details[0]
