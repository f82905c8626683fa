"""Create-only objects, through the real s3fs and botocore against a small S3 server over HTTP."""

import gzip
import hashlib
import io
import pickle
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import ClassVar
from xml.sax.saxutils import escape

import pyarrow as pa
import pytest

from pipeline.batch.commit import JobOutput
from pipeline.batch.rows import iter_rows
from pipeline.batch.source import plan_shards, read_shard
from pipeline.errors import DatasetError, OutputError
from pipeline.storage import open_storage
from tests.web import listening


class SmallS3(BaseHTTPRequestHandler):
    """As much of the S3 API as the pipeline uses, path-style: put, get, head, list and delete, with `If-None-Match`."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}
    guard = threading.Lock()
    honours_conditions = True
    tells_condition = True

    def do_PUT(self):
        key, body = self.key(), self.body()
        with self.guard:
            taken = key in self.objects and self.headers.get("If-None-Match") == "*" and self.honours_conditions
            if not taken:
                self.objects[key] = body
        if taken:
            condition = "<Condition>If-None-Match</Condition>" if self.tells_condition else ""
            self.answer(412, f"<Error><Code>PreconditionFailed</Code><Message>taken</Message>{condition}</Error>")
        else:
            self.answer(200, etag=body)

    def do_GET(self):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            return self.answer(200, self.listing(query))
        return self.serve(with_body=True)

    def do_HEAD(self):
        self.serve(with_body=False)

    def do_POST(self):
        body = self.body().decode()
        bucket = self.key().split("/")[0]
        for piece in body.split("<Key>")[1:]:
            self.objects.pop(f"{bucket}/{piece.split('</Key>')[0]}", None)
        self.answer(200, "<DeleteResult></DeleteResult>")

    def do_DELETE(self):
        self.objects.pop(self.key(), None)
        self.answer(204)

    def key(self):
        return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")

    def body(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return raw
        content = b""
        while True:
            head, _, raw = raw.partition(b"\r\n")
            size = int(head.split(b";")[0], 16)
            if size == 0:
                return content
            content, raw = content + raw[:size], raw[size + 2 :]

    def listing(self, query):
        bucket = self.key()
        prefix = query.get("prefix", [""])[0]
        delimiter = query.get("delimiter", [""])[0]
        files, folders = [], set()
        for name in sorted(self.objects):
            key = name.removeprefix(f"{bucket}/")
            if name.startswith(f"{bucket}/") and key.startswith(prefix):
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    files.append((key, len(self.objects[name])))
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>&quot;x&quot;</ETag>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key, size in files
        )
        prefixes = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
        count = f"<KeyCount>{len(files) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult><Name>{bucket}</Name>{count}{contents}{prefixes}</ListBucketResult>"

    def serve(self, *, with_body):
        content = self.objects.get(self.key())
        if content is None:
            error = "<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
            return self.answer(404, error if with_body else "")
        status, asked = 200, self.headers.get("Range", "")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(0, len(content) - int(last))
            status, content = 206, content[begin : int(last) + 1 if first and last else None]
        return self.answer(status, content, with_body=with_body, etag=content)

    def answer(self, status, content="", *, with_body=True, etag=b""):
        data = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.md5(etag).hexdigest()}"')  # noqa: S324 - what S3 calls an ETag
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if with_body and status != 204:
            self.wfile.write(data)

    def log_message(self, *_args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (SmallS3,), {"objects": {}, "guard": threading.Lock()})
    with listening(handler) as address:
        yield handler, address


@pytest.fixture
def options(server):
    return {
        "key": "test",
        "secret": "test",
        "client_kwargs": {"endpoint_url": server[1], "region_name": "us-east-1"},
    }


@pytest.fixture
def storage(options):
    return open_storage("s3://bucket/out/", options)


def test_the_first_writer_wins(storage):
    assert storage.list() == {}
    assert storage.create("a/b.txt", b"first")
    assert not storage.create("a/b.txt", b"second")
    assert storage.create("a/empty", b"")
    assert storage.read("a/b.txt") == b"first"
    assert storage.exists("a/b.txt")
    assert not storage.exists("a/c.txt")
    assert storage.list() == storage.list("a") == {"a/b.txt": 5, "a/empty": 0}
    assert storage.url("a/b.txt") == "s3://bucket/out/a/b.txt"
    assert pickle.loads(pickle.dumps(storage)).read("a/b.txt") == b"first"  # noqa: S301 - Ray carries it that way
    storage.remove_tree("a")
    storage.remove_tree("a")
    assert storage.list() == {}


def test_content_may_come_from_a_file(storage, tmp_path):
    (tmp_path / "source").write_bytes(b"a" * 3_000_000)
    (tmp_path / "empty").touch()
    assert storage.create_from_file("a", str(tmp_path / "source"))
    assert not storage.create_from_file("a", str(tmp_path / "empty"))
    assert storage.create_from_file("empty", str(tmp_path / "empty"))
    assert storage.list() == {"a": 3_000_000, "empty": 0}


def test_what_others_write_is_seen_at_once(storage, options):
    assert storage.list() == {}
    assert not storage.exists("x")
    other = open_storage("s3://bucket/out", options)
    assert other.create("x", b"1")
    assert storage.exists("x")
    assert storage.list() == {"x": 1}


def test_racing_writers_have_one_winner(storage, options):
    others = [open_storage("s3://bucket/out", options) for _ in range(6)]
    for number in range(5):
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(lambda i, n=number: others[i].create(f"{n}", bytes([i]) * 100), range(6)))
        assert sum(won) == 1
        assert storage.read(f"{number}") == bytes([won.index(True)]) * 100


def test_a_store_that_does_not_tell_why_it_refused_is_understood(server, storage):
    server[0].tells_condition = False
    assert storage.create("x", b"1")
    assert not storage.create("x", b"2")
    assert storage.read("x") == b"1"


def test_a_store_that_ignores_conditions_is_refused_before_any_work(server, storage):
    server[0].honours_conditions = False
    with pytest.raises(OutputError, match="lets a second writer replace"):
        JobOutput(storage, {"seed": 1}, "jsonl", 1).begin()


def test_a_missing_object_is_an_error_of_ours(storage):
    with pytest.raises(OutputError, match=r"s3://bucket/out/nothing cannot be read"):
        storage.read("nothing")


def test_a_server_that_is_gone_is_an_error_of_ours(options):
    gone = {**options, "client_kwargs": {**options["client_kwargs"], "endpoint_url": "http://127.0.0.1:9"}}
    gone["config_kwargs"] = {"retries": {"max_attempts": 0}}
    with pytest.raises(OutputError, match=r"s3://bucket/out cannot be listed"):
        open_storage("s3://bucket/out", gone).list()
    with pytest.raises(OutputError, match="unexpected keyword argument 'nosuch'"):
        open_storage("s3://bucket/out", {**options, "nosuch": 1}).list()
    with pytest.raises(DatasetError, match=r"s3://bucket/in/\*\.jsonl cannot be listed"):
        plan_shards("s3://bucket/in/*.jsonl", storage_options=gone)


def test_a_dataset_is_planned_and_read_there(server, options):
    server[0].objects["bucket/in/b.jsonl"] = b'{"q": 3}\n'
    server[0].objects["bucket/in/a.jsonl"] = b'{"q": 1}\n{"q": 2}\n'
    server[0].objects["bucket/in/_SUCCESS"] = b""
    for dataset in ("s3://bucket/in", "s3://bucket/in/*.jsonl"):
        plan = plan_shards(dataset, shard_rows=1, storage_options=options)
        rows = [row for shard in plan.shards for row in iter_rows(shard, read_shard(shard, storage_options=options))]
        assert [(row.identity, row.values["q"]) for row in rows] == [
            ("a.jsonl@0", 1),
            ("a.jsonl@9", 2),
            ("b.jsonl@0", 3),
        ]
        assert plan.shards[0].paths == ("s3://bucket/in/a.jsonl",)


def test_compressed_lines_and_arrow_are_read_there(server, options):
    arrow = io.BytesIO()
    table = pa.table({"q": [1, 2, 3]})
    with pa.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    server[0].objects["bucket/lines/year=2023/a.jsonl.gz"] = gzip.compress(b'{"q": 1}\n{"q": 2}\n')
    server[0].objects["bucket/lines/year=2024/a.jsonl"] = b'{"q": 3}\n'
    server[0].objects["bucket/tables/year=2024/a.arrow"] = arrow.getvalue()
    for dataset, years in (("s3://bucket/lines", [2023, 2023, 2024]), ("s3://bucket/tables", [2024] * 3)):
        plan = plan_shards(dataset, shard_rows=2, storage_options=options)
        rows = [row for shard in plan.shards for row in iter_rows(shard, read_shard(shard, storage_options=options))]
        assert [row.values for row in rows] == [
            {"q": q, "year": year} for q, year in zip((1, 2, 3), years, strict=True)
        ]
