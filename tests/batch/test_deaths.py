"""A driver, with its worker, killed before every change of the disk and within every write, and run again.

Each death is a real SIGKILL (or the kernel's own signal in the midst of a write) of a real process. Afterwards the same
command must give what an undisturbed run gives: the same files, with the same bytes, and nothing else.
"""

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import demo
from pipeline.batch.verify import verify
from pipeline.storage.local import LocalStorage
from tests.batch.deaths import Death, Drivers, drivers, labels
from tests.batch.outputs import contents, memory_folder

PAGE = Path(__file__).parents[2] / "docs" / "exactly-once.md"
STEP = re.compile(r"`((?:open|os\.\w+) [^`]+)`")
IDS = [f"row {number}" for number in range(10)]


@pytest.fixture(scope="module")
def server() -> Iterator[Drivers]:
    with drivers() as started:
        yield started


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        prompts = ["fail, row 4" if number == 4 else f"question {number}" for number in range(len(IDS))]
        pq.write_table(pa.table({"id": IDS, "prompt": prompts}), made / "in.parquet")
        pq.write_table(pa.table({"id": IDS[:4], "prompt": prompts[:4]}), made / "other.parquet")
        yield made


def options(folder: Path, output: str, **more: Any) -> dict[str, Any]:
    return {
        "dataset": str(folder / "in.parquet"),
        "expert": str(demo.package("sql")),
        "base_model": str(demo.BASE_MODEL),
        "output": str(folder / output),
        "shard_rows": 5,
        **more,
    }


def lasting(output: Path) -> dict[str, bytes]:
    """What the answers are made of; records of runs have times in them, and a round of retrying has a random name."""
    files = contents(LocalStorage(str(output)))
    named = {name: re.sub(rb'"retry": "[0-9a-f-]+"', b"", data) for name, data in files.items()}
    return {name: data for name, data in named.items() if not name.startswith(("_runs/", "_report/", "_SUCCESS"))}


def test_a_job(server: Drivers, folder: Path) -> None:
    die_everywhere(server, folder, "job", errors=1)


def test_a_job_whose_rows_with_errors_are_answered_again(server: Drivers, folder: Path) -> None:
    assert server.run(options(folder, "with-errors")).signal == 0
    die_everywhere(server, folder, "with-errors", errors=0, mended=True, retry_errors=True)


def test_a_job_in_the_place_of_another(server: Drivers, folder: Path) -> None:
    other = options(folder, "another", dataset=str(folder / "other.parquet"), shard_rows=2)
    assert server.run(other).signal == 0
    die_everywhere(server, folder, "another", errors=1, overwrite=True)


def test_the_page_lists_every_step(server: Drivers, folder: Path) -> None:
    taken = [steps(server, folder, "listed")]
    taken.append(steps(server, folder, "listed", mended=True, retry_errors=True))
    steps(server, folder, "replaced", dataset=str(folder / "other.parquet"), shard_rows=2)
    taken.append(steps(server, folder, "replaced", overwrite=True))
    sections = PAGE.read_text().split("\n### ")[1:]
    assert [set(STEP.findall(section.partition("\n## ")[0])) for section in sections] == taken


def steps(server: Drivers, folder: Path, output: str, *, mended: bool = False, **more: Any) -> set[str]:
    """What an undisturbed run does to its disk, as the page has it."""
    life = server.run(options(folder, output, **more), mended=mended)
    assert life.signal == 0
    named = [re.sub(r"(_lease|_errors)/.*", r"\1/*", label) for label in labels(life.steps)]
    return {re.sub(r"(?<=part-)\d+|(?<=_commits/)\d+", "00000", label) for label in named}


def die_everywhere(server: Drivers, folder: Path, name: str, *, errors: int, mended: bool = False, **more: Any) -> None:
    """Kill a job at each step of its disk, and see that the same command makes it whole.

    Args:
        server: What drives it.
        folder: Where its input is, and its outputs go.
        name: Of the output as it was before; it may not exist. Where it does, what is not special to it is left out:
            deaths within writes, and before an attempt is cleared away.
        errors: Rows with an error in the end.
        mended: Whether the engine answers every row.
        more: Options of the job.
    """

    def new_output(kind: str) -> str:
        if (folder / name).exists():
            shutil.copytree(folder / name, folder / f"{name}-{kind}")
        return f"{name}-{kind}"

    is_new = not (folder / name).exists()
    output = new_output("undisturbed")
    life = server.run(options(folder, output, **more), mended=mended)
    wanted = lasting(folder / output)
    parts = sorted((folder / output).glob("part-*"))
    assert [row for part in parts for row in pq.read_table(part)["id"].to_pylist()] == IDS
    num_writes = sum(step.startswith("open ") for step in life.steps)
    deaths = [Death(at) for at, step in enumerate(labels(life.steps)) if is_new or step != "os.remove _attempts/*"]
    deaths += [Death(at, "within") for at in range(num_writes if is_new else 0)]
    assert num_writes > 10
    for death in deaths:
        output = new_output(f"{death.moment}-{death.at}")
        died = server.run(options(folder, output, **more), death=death, mended=mended)
        where = f"{death.moment} {labels(life.steps)[death.at] if death.moment == 'before' else death.at}"
        assert died.signal in (signal.SIGKILL, signal.SIGXFSZ), where
        assert server.run(options(folder, output, **more), mended=mended).signal == 0, where
        assert lasting(folder / output) == wanted, where
        found = verify(LocalStorage(str(folder / output)))
        assert (found.problems, found.rows, found.errors) == ((), len(IDS), errors), where
