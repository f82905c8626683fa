"""Columns that nobody wants are not read, and not carried to the answers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import demo
from pipeline.batch.blocks import run_blocks
from pipeline.batch.config import BatchConfig
from pipeline.batch.layout import part_name
from pipeline.batch.parts import OUR_SCHEMA
from pipeline.batch.plan import open_experts, prepare
from pipeline.errors import ConfigError, DatasetError, FingerprintError
from tests.batch.deaths import drive_here

ROWS = [
    {"id": number, "question": f"question {number}", "source": f"s{number}", "huge": "x" * 100, "text": "taken"}
    for number in range(7)
]


def write(folder: Path, kind: str) -> Path:
    path = folder / "year=2026" / f"in.{kind}"
    path.parent.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        # a later line with a column that the first ones lack would be an error of its row, if it was wanted
        lines = [*ROWS[:-1], {**ROWS[-1], "late": [1]}]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def config(folder: Path, **more: Any) -> BatchConfig:
    return BatchConfig.from_options(
        dataset=folder,
        expert=demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=folder.parent / "out",
        shard_rows=4,
        output_format="parquet",
        prompt_template="Q: {question}",
        **more,
    )


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_only_what_is_kept_or_has_a_role_is_carried(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    kept = config(write(folder, kind), keep_columns=["source", "year"])
    job = prepare(kept, open_experts(kept))
    if kind == "parquet":
        with pa.ipc.open_stream(next(run_blocks(job.plan.shards, {}, job.kept))["rows"][0].as_py()) as reader:
            assert set(reader.schema.names) == {"id", "question", "source", "year"}
    drive_here(job, mended=True)
    parts = [pq.read_table(tmp_path / "out" / part_name(shard, "parquet")) for shard in range(len(job.plan.shards))]
    table = pa.concat_tables(parts)
    assert set(table.column_names) - set(OUR_SCHEMA.names) == {"id", "question", "source", "year"}
    assert table["error"].null_count == 7
    assert table["text"].to_pylist() == [f":Q: {row['question']}" for row in ROWS], (
        "our own column: theirs was left out"
    )
    assert table["source"].to_pylist() == [row["source"] for row in ROWS]
    other = config(folder, keep_columns=["source"])
    with pytest.raises(FingerprintError) as caught:
        prepare(other, open_experts(other)).output.begin()
    assert [detail.partition(":")[0] for detail in caught.value.details] == ["keep_columns"]


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    wrong = config(write(folder, "parquet"), keep_columns=["sorce"])
    with pytest.raises(DatasetError, match="no column 'sorce'"):
        prepare(wrong, open_experts(wrong))
    with pytest.raises(ConfigError, match="keep_columns"):
        BatchConfig.from_options(dataset="a.jsonl", expert="b", output="c", format="openai", keep_columns=["a"])
