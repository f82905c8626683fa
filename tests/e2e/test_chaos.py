"""A job on a real Ray of several nodes, while workers die at their commits, and nodes go and come.

Drivers that die are in test_deaths, at every step, and in test_kill, on Ray; `benchmarks.batch_soak` kills them all.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from pipeline import demo
from pipeline.batch.verify import verify
from pipeline.storage.local import LocalStorage
from tests.e2e.processes import BIN, running, wait_until

NUM_ROWS = 96
WORKER_DEATHS = (
    0,  # before the link that commits a part
    1,  # after it, before the attempt is cleared away
    2,  # before the link that makes the receipt
    3,  # after it
    9,  # a link, when some shards were committed in between
    12,
)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    started.add_node(num_cpus=1)
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def options(cluster: Cluster, folder: Path, output: str, **more: Any) -> dict[str, Any]:
    table = pa.table({"id": range(NUM_ROWS), "prompt": [f"question {number}" for number in range(NUM_ROWS)]})
    pq.write_table(table, folder / "in.parquet")
    return {
        "dataset": str(folder / "in.parquet"),
        "expert": str(demo.package("sql")),
        "base_model": str(demo.BASE_MODEL),
        "output": str(folder / output),
        "shard_rows": 4,
        "num_workers": 2,
        "shards_in_flight": 1,
        "ray_address": cluster.address,
        **more,
    }


def command(told: dict[str, Any]) -> list[str | Path]:
    return [BIN / "python", "-m", "benchmarks.batch_driver", json.dumps(told)]


def is_whole(output: Path) -> bool:
    found = verify(LocalStorage(str(output)))
    rows = [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    return (
        found.problems == ()
        and [row["id"] for row in rows] == list(range(NUM_ROWS))
        and [row["text"] for row in rows] == [f":question {number}" for number in range(NUM_ROWS)]
        and not (output / "_attempts").exists()
    )


# Beside another Ray on the machine its nodes never give the driver a worker; alone they do.
@pytest.mark.skipif(
    os.environ.get("EXPERT_CHAOS") != "1",
    reason="set EXPERT_CHAOS=1 and run it alone, with -n 0",
)
@pytest.mark.timeout(900)
def test_workers_die_at_their_commits_while_nodes_go_and_come(nodes: Cluster, tmp_path: Path) -> None:
    marks, output = tmp_path / "marks", tmp_path / "out"
    marks.mkdir()
    told = {
        "job": options(nodes, tmp_path, "out"),
        "seconds_per_row": 0.05,
        "deaths": WORKER_DEATHS,
        "marks": str(marks),
    }
    with running(command(told), tmp_path / "log") as driver:

        def parts(number: int) -> bool:
            return wait_until(
                lambda: len(list(output.glob("part-*"))) >= number or driver.poll() is not None, seconds=240
            )

        assert parts(4)
        lost = sorted(nodes.worker_nodes, key=lambda node: node.unique_id)[0]
        nodes.remove_node(lost, allow_graceful=False)
        assert parts(10)
        nodes.add_node(num_cpus=1)
        assert wait_until(lambda: driver.poll() is not None, seconds=300), (tmp_path / "log").read_text()
        assert driver.returncode == 0, (tmp_path / "log").read_text()
    assert len(list(marks.iterdir())) == len(WORKER_DEATHS), "every one of them died"
    assert is_whole(output)
