"""Hub addresses, read from a local copy of the published layout: images undecoded, errors that say what to do."""

import sys
from pathlib import Path

import pytest
from source_fixtures import blink_row, mmiu, ref_l4, write_json, write_parquet

from polyground.answer import Answer
from polyground.errors import DataError
from polyground.sources import SOURCES, read_source
from polyground.sources.hub import HUB_IDS, hub_rows

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_blink(folder: Path) -> Path:
    """BLINK as on the hub: a card that lists the configurations, a folder each, two splits, images embedded."""
    card = ["---", "configs:"]
    for config in ("Art_Style", "Counting", "Jigsaw"):
        card += [f"- config_name: {config}", "  data_files:"]
        for split in ("val", "test"):
            hidden = {"answer": "hidden"} if split == "test" else {}
            row = blink_row(idx=f"{split}_{config}_1", sub_task=config.replace("_", " "), **hidden)
            write_parquet(folder / config / f"{split}-00000-of-00001.parquet", [row])
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


def test_images_pass_through_as_bytes_and_path(tmp_path: Path) -> None:
    folder = write_blink(tmp_path / "BLINK")
    [row] = hub_rows(f"hub:{folder}@Jigsaw:val")
    assert row["idx"] == "val_Jigsaw_1"
    assert row["image_1"] == blink_row()["image_1"]
    assert row["image_4"] is None


@pytest.mark.parametrize("split", ["val", "val[:1]"], ids=["streamed", "sliced"])
def test_images_that_are_declared_as_such_stay_undecoded(tmp_path: Path, split: str) -> None:
    """What `push_to_hub` writes: the parquet file says that its columns are images."""
    image = {"bytes": blink_row()["image_1"]["bytes"], "path": "a.jpg"}
    features = datasets.Features(
        {"one": datasets.Image(), "many": datasets.List(datasets.Image()), "idx": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_list([{"one": image, "many": [image, image], "idx": "1"}], features=features)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "val-00000-of-00001.parquet")
    [row] = hub_rows(f"hub:{tmp_path}:{split}")
    assert row == {"one": image, "many": [image, image], "idx": "1"}


def test_without_a_configuration_all_are_read_in_order(tmp_path: Path) -> None:
    folder = write_blink(tmp_path / "BLINK")
    assert [row["idx"] for row in hub_rows(f"hub:{folder}:val")] == ["val_Art_Style_1", "val_Counting_1", "val_Jigsaw_1"]


def test_a_slice_of_a_split(tmp_path: Path) -> None:
    folder = write_blink(tmp_path / "BLINK")
    assert len(list(hub_rows(f"hub:{folder}@Jigsaw:val[:1]"))) == 1


def test_blink_from_its_published_folder(tmp_path: Path) -> None:
    folder = write_blink(tmp_path / "BLINK")
    examples = read_source(
        "blink", f"hub:{folder}:val", images_out=tmp_path / "out", sub_tasks="multi_image", check_images="decode"
    )
    assert [example.key for example in examples] == ["blink/Art Style/0", "blink/Jigsaw/0"]
    assert examples[0].target == Answer(choice="B")
    with pytest.raises(DataError, match="2 no_answer"):
        read_source("blink", f"hub:{folder}:test", images_out=tmp_path / "out", sub_tasks="multi_image")


def test_embedded_images_need_a_place_to_go(tmp_path: Path) -> None:
    folder = write_blink(tmp_path / "BLINK")
    with pytest.raises(DataError, match="set images_out"):
        read_source("blink", f"hub:{folder}@Jigsaw:val")


def test_mmiu_and_ref_l4_from_their_published_folders(tmp_path: Path) -> None:
    path, _ = mmiu(tmp_path / "mmiu")
    (tmp_path / "mmiu" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: all.parquet\n---\n"
    )
    [example] = read_source("mmiu", f"hub:{path.parent}:test", images_root=path.parent)
    assert example.meta["relation"] == "Low-level-semantic"
    path, options = ref_l4(tmp_path / "ref")
    card = "---\nconfigs:\n- config_name: ref_l4\n  data_files:\n  - split: val\n    path: ref-l4-val.parquet\n---\n"
    (path.parent / "README.md").write_text(card)
    assert len(read_source("ref_l4", f"hub:{path.parent}", **options)) == 2


def test_one_file_of_a_repository_is_read_as_it_stands(tmp_path: Path) -> None:
    """From the copy of an earlier download, in the layout that huggingface_hub keeps."""
    copy = tmp_path / "cache" / "datasets--GD-ML--UniVG-R1-data"
    rows = [{"bbox": [[1, 2, 3, 4]]}, {"bbox": "x"}]
    write_json(copy / "snapshots" / "abc" / "zero_shot_evaluation" / "LLMSeg_eval.json", rows)
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("abc")
    assert list(hub_rows("hub:GD-ML/UniVG-R1-data/zero_shot_evaluation/LLMSeg_eval.json")) == rows


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hub:nobody/nothing", "the hub is out of reach .*; download the data set and give its folder"),
        ("hub:nobody/nothing@a:test", "the hub is out of reach"),
        ("hub:nobody/nothing/data/rows.json", "cannot be read .*; download the data set"),
        ("hub:", "an address of the hub is hub:owner/name"),
        ("hub:./no/such/folder", "there is no folder ./no/such/folder"),
        ("hub:{folder}", "has the splits val, test; name one, as in"),
        ("hub:{folder}@Jigsaw:train", "no such configuration or split.*'val', 'test'"),
        ("hub:{folder}@Jig:val", "no such configuration or split.*'Jigsaw'"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, address: str, message: str) -> None:
    folder = write_blink(tmp_path / "BLINK")
    with pytest.raises(DataError, match=message):
        list(hub_rows(address.format(folder=folder)))


def test_a_damaged_file_is_an_error_after_the_address(tmp_path: Path) -> None:
    folder = write_blink(tmp_path / "BLINK")
    file = folder / "Jigsaw" / "val-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"BLINK@Jigsaw:val: "):
        list(hub_rows(f"hub:{folder}@Jigsaw:val"))


def test_without_datasets_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install .*\[train\]'"):
        list(hub_rows("hub:nobody/nothing"))


def test_a_published_address_belongs_to_a_source() -> None:
    assert set(HUB_IDS) <= set(SOURCES)


def test_errors_of_whoever_reads_the_rows_are_left_alone(tmp_path: Path) -> None:
    rows = hub_rows(f"hub:{write_blink(tmp_path / 'BLINK')}@Jigsaw:val")
    with pytest.raises(ValueError, match="could not convert"):
        sum(float(row["idx"]) for row in rows)
