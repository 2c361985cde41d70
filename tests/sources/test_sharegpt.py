"""ShareGPT and LLaMA-Factory: both message layouts, and everything dataset_info.json may say."""

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_gold_scores_one, write_images, write_rows

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.sources import read_source, scan_source
from polyground.sources.reading import collect, reasons_of

GOLD = Answer((Located(2, Box(0.1, 0.2, 0.5, 0.75)),))
ASKED, ANSWERED = "<image><image>Find the cup.", "It is in the second image: [100, 200, 500, 750]"
SHAREGPT = {
    "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}],
    "images": ["pictures/a.png", "pictures/b.png"],
    "system": "Be kind.",
}
OPENAI = {
    "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}],
    "images": ["pictures/a.png", "pictures/b.png"],
}
RENAMED = {
    "talk": [{"who": "sys", "says": "Be kind."}, {"who": "me", "says": ASKED}, {"who": "bot", "says": ANSWERED}],
    "photos": ["pictures/a.png", "pictures/b.png"],
}
ALPACA = {
    "instruction": "<image><image>Find",
    "input": "the cup.",
    "output": ANSWERED,
    "images": ["pictures/a.png", "pictures/b.png"],
}

TAGS = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "bot", "system_tag": "sys"}
ENTRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "usual": ({"formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images"}}, SHAREGPT),
    "roles": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        OPENAI,
    ),
    "openai": ({"formatting": "openai", "columns": {"images": "images"}}, OPENAI),
    "renamed": ({"formatting": "sharegpt", "columns": {"messages": "talk", "images": "photos"}, "tags": TAGS}, RENAMED),
    "alpaca": ({"columns": {"images": "images"}}, ALPACA),
}


def write_data_sets(folder: Path) -> Path:
    """A folder as LLaMA-Factory's data/: dataset_info.json, one file per entry, images beside."""
    write_images(folder, "pictures/a.png", "pictures/b.png")
    info = {}
    for name, (entry, row) in ENTRIES.items():
        info[name] = {"file_name": f"files/{name}.json", **entry}
        (folder / "files").mkdir(exist_ok=True)
        write_rows(folder / "files" / f"{name}.json", [row])
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder / "dataset_info.json"


@pytest.mark.parametrize("row", [SHAREGPT, OPENAI], ids=["from-value", "role-content"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_both_message_layouts_are_told_apart(tmp_path: Path, row: dict[str, Any], suffix: str) -> None:
    write_images(tmp_path, "pictures/a.png", "pictures/b.png")
    [example] = read_source("sharegpt", write_rows(tmp_path / f"rows{suffix}", [row]), grid="per_mille")
    assert (example.question, example.target) == (ASKED, GOLD)
    assert_gold_scores_one([example])


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("given", ["dataset_info.json", "."], ids=["the-info", "its-folder"])
def test_an_entry_of_dataset_info_is_honoured(tmp_path: Path, name: str, given: str) -> None:
    write_data_sets(tmp_path)
    [example] = read_source("sharegpt", tmp_path / given, dataset=name, grid="per_mille")
    assert example.target == GOLD
    assert example.question.split() == ASKED.split()
    assert example.images[0] == tmp_path / "pictures" / "a.png"


def test_an_entry_beside_the_data_file_is_honoured(tmp_path: Path) -> None:
    write_images(tmp_path, "pictures/a.png", "pictures/b.png")
    entry, row = ENTRIES["renamed"]
    (tmp_path / "dataset_info.json").write_text(json.dumps({"renamed": entry}))
    file = write_rows(tmp_path / "renamed.jsonl", [row])
    [example] = read_source("sharegpt", file, dataset="renamed", grid="per_mille")
    assert example.target == GOLD
    assert reasons_of(collect(scan_source("sharegpt", file, grid="per_mille"))[1]) == {"malformed": 1}


def test_the_only_entry_needs_no_name(tmp_path: Path) -> None:
    write_images(tmp_path, "pictures/a.png", "pictures/b.png")
    write_rows(tmp_path / "x.json", [SHAREGPT])
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"x": {"file_name": "x.json", "formatting": "sharegpt", "columns": {"images": "images"}}}))
    assert len(read_source("sharegpt", info, grid="per_mille")) == 1


def test_the_history_of_an_alpaca_row_is_earlier_turns(tmp_path: Path) -> None:
    write_images(tmp_path, "pictures/a.png", "pictures/b.png")
    row = {**ALPACA, "instruction": "And the hat?", "input": "", "past": [[ASKED, ANSWERED]]}
    write_rows(tmp_path / "x.json", [row])
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"x": {"file_name": "x.json", "columns": {"history": "past", "images": "images"}}}))
    examples = read_source("sharegpt", info, grid="per_mille")
    assert [(example.key, example.question) for example in examples] == [
        ("sharegpt/0/0", ASKED),
        ("sharegpt/0/1", "And the hat?"),
    ]


@pytest.mark.parametrize(
    ("info", "message"),
    [
        pytest.param({"usual": {"file_name": "x"}}, r"got 'usal'; did you mean 'usual'\? Known: usual", id="misspelt"),
        pytest.param({"usal": {"hf_hub_url": "a/b"}}, "no file_name; download the data set", id="on-a-hub"),
        pytest.param(
            {"usal": {"file_name": "x", "formatting": "parquet"}}, "formatting 'parquet'; known: alpaca", id="formatting"
        ),
        pytest.param({"usal": {"file_name": "x", "ranking": True}}, "preference data set", id="ranking"),
        pytest.param({"usal": {"file_name": "x", "columns": ["a"]}}, "columns must map names to names", id="columns-no-object"),
        pytest.param({"usal": {"file_name": "x", "tags": {"role_tag": 1}}}, "tags must map names to names", id="tags-no-names"),
        pytest.param({"usal": 7}, "entry 'usal' must be an object", id="no-object"),
        pytest.param([], "holds no data sets", id="a-list"),
    ],
)
def test_a_dataset_info_that_cannot_be_used(tmp_path: Path, info: Any, message: str) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=rf"dataset_info\.json: .*{message}"):
        read_source("sharegpt", tmp_path / "dataset_info.json", dataset="usal")


def test_a_half_written_dataset_info_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"usual": {')
    with pytest.raises(DataError, match=r"dataset_info\.json: not valid JSON"):
        read_source("sharegpt", tmp_path / "dataset_info.json", dataset="usual")
