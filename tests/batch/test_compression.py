"""Compressed text: the same rows as the text itself, within a bound, and damage is told by name."""

import gzip
import io
import json
import zlib

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch.compression import DecompressedFile, is_bomb, split_codec
from pipeline.batch.rows import iter_rows
from pipeline.batch.source import plan_shards, read_shard
from pipeline.errors import DatasetError

COMPRESS = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
EXTENSIONS = {"gzip": ".gz", "zstd": ".zst"}
codecs = pytest.mark.parametrize("codec", COMPRESS)


def opened(data: bytes, codec: str, max_bytes: int = 1 << 30) -> DecompressedFile:
    return DecompressedFile(io.BytesIO(data), "x.jsonl.gz", codec, max_bytes)


def rows_of(path, **options):
    plan = plan_shards(path, **options)
    return [row for shard in plan.shards for row in iter_rows(shard, read_shard(shard))]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.jsonl.gz", ("a.jsonl", "gzip")),
        ("b/A.CSV.GZ", ("b/A.CSV", "gzip")),
        ("a.zst", ("a", "zstd")),
        ("a.json.zstd", ("a.json", "zstd")),
        ("a.jsonl", ("a.jsonl", None)),
        ("gz", ("gz", None)),
    ],
)
def test_the_name_tells_the_compression(name, split):
    assert split_codec(name) == split


@codecs
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), st.lists(st.integers(0, 100), max_size=20))
@settings(deadline=None, max_examples=60)
def test_all_members_are_read_in_pieces_of_any_size_and_again(codec, members, sizes):
    whole = b"".join(members)
    file = opened(b"".join(COMPRESS[codec](member) for member in members), codec)
    pieces = [file.read(size) for size in sizes]
    assert [len(piece) for piece in pieces] == [
        min(size, max(0, len(whole) - sum(sizes[:index]))) for index, size in enumerate(sizes)
    ]
    assert b"".join(pieces) + file.read() == whole
    assert file.read() == b""
    file.seek(0)
    assert file.read() == whole


@codecs
def test_the_bound_is_exact_and_says_what_to_raise(codec):
    data = COMPRESS[codec](b"x" * 1000)
    assert len(opened(data, codec, 1000).read()) == 1000
    for size in (-1, 1000, 5000):
        with pytest.raises(DatasetError, match=r"x\.jsonl\.gz unpacks to more than 999 bytes") as caught:
            opened(data, codec, 999).read(size)
        assert "max_decompressed_bytes" in caught.value.hint


@codecs
def test_a_bomb_is_not_unpacked_beyond_the_bound(codec):
    bomb = COMPRESS[codec](b"\n" * 100_000_000) * 20
    source = io.BytesIO(bomb)
    file = DecompressedFile(source, "x", codec, 1_000_000)
    before = pa.total_allocated_bytes()
    with pytest.raises(DatasetError, match="unpacks to more than 1000000 bytes"):
        file.read()
    assert source.tell() <= 200_000
    assert pa.total_allocated_bytes() - before <= 4_000_000


@codecs
@pytest.mark.parametrize("extension", ["jsonl", "ndjson", "json"])
def test_json_lines_are_one_shard_a_file_and_the_same_rows(tmp_path, codec, extension):
    lines = [json.dumps({"q": f"ä {number}", "n": number}) for number in range(1000)] + ["not json", "", "{}"]
    text = "\ufeff" + "\r\n".join(lines)
    (tmp_path / f"a.{extension}").write_bytes(text.encode())
    packed = tmp_path / f"a.{extension}{EXTENSIONS[codec]}"
    packed.write_bytes(COMPRESS[codec](text.encode()))
    plan = plan_shards(packed, shard_rows=10)
    (shard,) = plan.shards
    (item,) = shard.slices
    assert (item.start, item.stop, item.num_rows) == (0, packed.stat().st_size, None)
    assert plan.schema == plan_shards(tmp_path / f"a.{extension}").schema
    found = [(row.identity.partition("@")[2], row.values, row.failure is None) for row in rows_of(packed)]
    plain = rows_of(tmp_path / f"a.{extension}", shard_rows=10)
    assert found == [(row.identity.partition("@")[2], row.values, row.failure is None) for row in plain]
    assert len(found) == 1002


@codecs
def test_csv_is_cut_by_records_and_the_same_rows(tmp_path, codec):
    text = 'q,n\n"two\nlines",1\nb,2\nc,\n'
    (tmp_path / "a.csv").write_text(text)
    packed = tmp_path / f"b.csv{EXTENSIONS[codec]}"
    packed.write_bytes(COMPRESS[codec](text.encode()))
    assert [shard.num_rows for shard in plan_shards(packed, shard_rows=2).shards] == [2, 1]
    assert [row.values for row in rows_of(packed, shard_rows=2)] == [row.values for row in rows_of(tmp_path / "a.csv")]
    assert rows_of(packed, shard_rows=2) == rows_of(packed)


def test_plain_and_compressed_files_are_one_dataset(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"q": 2}\n{"q": 3}\n'))
    (tmp_path / "c.ndjson.zst").write_bytes(COMPRESS["zstd"](b'{"q": 4}\n'))
    assert [row.values["q"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_a_format_that_is_given_goes_before_the_name_but_not_the_compression(tmp_path):
    (tmp_path / "rows.gz").write_bytes(gzip.compress(b'{"q": 1}\n'))
    assert [row.values for row in rows_of(tmp_path / "rows.gz", format="jsonl")] == [{"q": 1}]


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.jsonl.bz2", "a.arrow.zst"])
def test_other_compressions_are_refused_by_name(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DatasetError, match="extension that tells no format") as caught:
        plan_shards(tmp_path)
    assert caught.value.details == (name,)
    assert "(text also with .gz, .zst, .zstd)" in caught.value.hint


DAMAGE = {
    "cut off": lambda data: data[:-20],
    "another byte": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]
    ),
    "trailing garbage": lambda data: data + b"garbage",
    "not compressed": lambda data: zlib.decompress(data, wbits=31),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_damage_is_told_by_name(tmp_path, damage, form):
    line = '{"q": "%s"}\n' if form == "jsonl" else "%s\n"
    text = "".join(line % number for number in range(100_000))
    path = tmp_path / f"a.{form}.gz"
    path.write_bytes(DAMAGE[damage](gzip.compress(text.encode())))
    with pytest.raises(DatasetError, match=rf"a\.{form}\.gz cannot be read"):
        rows_of(path)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_the_bound_holds_for_a_job(tmp_path, form):
    text = '{"q": "x"}\n' * 100 if form == "jsonl" else "q\n" + "x\n" * 100
    path = tmp_path / f"a.{form}.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert len(rows_of(path, max_decompressed_bytes=len(text))) == 100
    with pytest.raises(DatasetError, match="unpacks to more than") as caught:
        rows_of(path, max_decompressed_bytes=len(text) - 1)
    assert "max_decompressed_bytes" in caught.value.hint


def test_what_a_bomb_is():
    assert is_bomb(1_000, 1_000_001, 10_000)
    assert not is_bomb(1_000, 1_000_000, 10_000), "a thousandfold is met in honest data"
    assert not is_bomb(1, 10_000, 10_000), "small is never a bomb"
    assert is_bomb(0, 10_001, 10_000)
