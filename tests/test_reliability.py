"""The fault harness can tell a run that was harmed from one that was not; its figures and the fuzzers' are those of the page."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import fuzz
import pytest
import reliability

from polyground.storage import RunFolder

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def run_of(path: Path) -> Path:
    with RunFolder(path / "reject", "reject", {"seed": 1}) as folder:
        folder.append("rows.jsonl", {"key": "a", "seconds": 1.0})
        folder.append("rows.jsonl", {"key": "b"})
        folder.finish({"asked": 2})
    (path / "report.html").write_text("<h3>Wall time</h3><table>3 s</table><p>right</p>")
    return path


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    return run_of(tmp_path / "calm")


def test_two_runs_that_differ_in_times_alone_are_equal(calm: Path, tmp_path: Path) -> None:
    other = run_of(tmp_path / "other")
    (other / "report.html").write_text("<h3>Wall time</h3><table>9 s</table><p>right</p>")
    (other / "reject" / "checkpoint-1").mkdir()
    (other / "reject" / "checkpoint-1" / "state.json").write_text("{}")
    assert reliability.differences(calm, other) == []
    assert reliability.half_files(other) == []


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        pytest.param("reject/rows.jsonl", '{"key": "a"}\n', "differs: reject/rows.jsonl", id="row-lost"),
        pytest.param("report.html", "<h3>Wall time</h3><table></table><p>wrong</p>", "differs: report.html", id="page"),
        pytest.param("reject/more.jsonl", "{}\n", "only in one: reject/more.jsonl", id="file-too-many"),
    ],
)
def test_what_a_fault_did_is_noticed(calm: Path, tmp_path: Path, file: str, content: str, told: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(calm, other)
    (other / file).write_text(content)
    assert reliability.differences(calm, other) == [told]


def test_a_half_written_file_in_a_folder_that_says_it_is_complete_is_noticed(calm: Path) -> None:
    (calm / "reject" / "rows.jsonl").write_text('{"key": "a"}\n{"ke')
    (calm / "reject" / "table.json").write_text('{"a"')
    assert len(reliability.half_files(calm)) == 2


def test_a_process_is_killed_before_the_file_operation_of_that_number(tmp_path: Path) -> None:
    names = [tmp_path / f"{number}.txt" for number in range(4)]

    def work(_: object = None) -> None:
        for name in names:
            name.write_text("x")

    process = os.fork()
    if process == 0:
        reliability.FileOperations(tmp_path, kill_before=3)()
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -9
    assert [name.exists() for name in names] == [True, True, False, False]


def test_every_fault_of_the_list_is_injected_somewhere() -> None:
    told = json.loads((PAGE.parent / "reliability.json").read_text(encoding="utf-8"))
    injected = Counter[str]()
    for row in told["faults"]:
        injected[row["fault"]] += row["injected"]
    assert len(injected) >= 8
    assert min(injected.values()) > 0


def test_the_page_shows_the_figures_that_were_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert reliability.table(json.loads((PAGE.parent / "reliability.json").read_text(encoding="utf-8"))) in page
    assert fuzz.table(fuzz.read_results(fuzz.RESULTS)) in page
