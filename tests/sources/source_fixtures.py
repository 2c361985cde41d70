"""One small annotation per source, in its exact published layout, with its images: written fresh into a test's folder.

A new source joins by a writer in FIXTURES. Boxes fall on whole pixels and whole per-mille numbers, so that gold answers survive
both grids exactly.
"""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

WIDE, TALL = (200, 100), (100, 200)
SECRET = "the answer is hidden here"
"""Stands in the free-text fields that hold the answer; no prompt may show it."""

Written = tuple[Path, dict[str, Any]]
"""The annotation file, and the options to read it with."""


def picture(path: Path, size: tuple[int, int] = WIDE, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def picture_bytes(size: tuple[int, int] = WIDE, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


# ---------------------------------------------------------------- grounding


def mig_bench(folder: Path) -> Written:
    for name in "abc":
        picture(folder / "images" / f"{name}.jpg")
    images = ["./images/a.jpg", "./images/b.jpg", "./images/c.jpg"]
    known = {"images": images, "need_format": True}
    rows = [
        {
            "task": "object_tracking",
            "question": "For the object in the first image(<|box_start|>(100,300),(500,750)<|box_end|>), "
            "please locate it in the 3th image. ",
            "answer": [0.25, 0.2, 0.5, 0.75],
            "additional_info": "",
            **known,
        },
        {
            "task": "group_grounding",
            "question": "Find and locate: <|object_ref_start|>the red one<|object_ref_end|>.",
            "answer": [0.05, 0.1, 0.95, 0.9],
            "additional_info": f"It is in the second image. {SECRET}",
            **known,
        },
    ]
    return write_json(folder / "MIG_data.json", rows), {"version": "original"}


def mc_bench_tables() -> dict[str, Any]:
    """Three descriptions: two instances over both images, one in the second image, none."""
    texts = [("Golf balls with the same color", True, "Comparison"), ("The man who has swung", True, "Reasoning")]
    texts.append(("People lifting the same leg", False, "Referring"))
    sizes = [WIDE, TALL]
    boxes = [(0, 0, 1, [20, 10, 100, 50]), (1, 0, 2, [10, 20, 50, 100]), (3, 1, 1, [0, 0, 100, 200])]
    return {
        "info": {"year": 2024, "version": "0.2", "description": "MC-Bench Dataset"},
        "descriptions": [
            {"id": n, "images_id": [2 * n, 2 * n + 1], "text": text, "positive_sample": positive, "text_style": style}
            for n, (text, positive, style) in enumerate(texts)
        ],
        "images": [
            {"id": n, "text_id": n // 2, "inter_img_id": n % 2, "file_name": f"D3/{n}.jpg"}
            | {"height": sizes[n % 2][1], "width": sizes[n % 2][0]}
            for n in range(6)
        ],
        "annotations": [
            {"id": n, "image_id": image, "text_id": text, "category_id": group}
            | {"area": box[2] * box[3], "bbox": box, "iscrowd": 0}
            for n, (image, text, group, box) in enumerate(boxes)
        ],
        "categories": [{"id": n, "name": f"group {n}"} for n in (1, 2, 3)],
    }


def mc_bench(folder: Path) -> Written:
    for n in range(6):
        picture(folder / "mc-bench_images" / "D3" / f"{n}.jpg", TALL if n % 2 else WIDE)
    return write_json(folder / "mc-bench_v0.2_val.json", mc_bench_tables()), {"check_sizes": True}


def mc_bench_coco(folder: Path) -> Written:
    """The file of the evaluation script: the same pairs, without a table of descriptions."""
    mc_bench(folder)
    tables = mc_bench_tables()
    texts = [description["text"] for description in tables["descriptions"]]
    images = [
        {"id": image["id"], "file_name": image["file_name"], "pair_id": image["text_id"], "id_in_pair": image["inter_img_id"] + 1}
        | {"height": image["height"], "width": image["width"], "pair_image_id": image["id"] ^ 1}
        | {"description": texts[image["text_id"]]}
        for image in tables["images"]
    ]
    annotations = [
        {key: value for key, value in row.items() if key != "text_id"}
        | {"pair_id": row["text_id"], "pair_image_id": row["image_id"] ^ 1, "description": texts[row["text_id"]]}
        for row in tables["annotations"]
    ]
    coco = {"images": images, "annotations": annotations, "categories": tables["categories"]}
    return write_json(folder / "MC-Bench_coco_format.json", coco), {}


def lisa(folder: Path) -> Written:
    picture(folder / "images" / "1.jpg")
    row = {"image_path": "images/1.jpg", "instruction": "what keeps the rain off?", "boxes": [[20, 10, 120, 60], [0, 0, 10, 10]]}
    return write_json(folder / "lisa_val.json", [row]), {}


def llmseg(folder: Path) -> Written:
    picture(folder / "LLMSeg" / "images" / "1.jpg", TALL)
    row = {"image_path": "1.jpg", "question": "Which part would you hold?", "bbox": [[10, 20, 60, 120]]}
    return write_json(folder / "LLMSeg_eval.json", [row]), {"images_root": folder / "LLMSeg" / "images"}


def revos(folder: Path) -> Written:
    for name in ("00000", "00005", "00010", "00100"):
        picture(folder / "videos" / "cats" / f"{name}.jpg")
    row = {"video_id": "cats", "frames": [0, 1, 3], "question": "Which cat jumps first?"}
    boxes = [[0, 0, 10, 10], [0, 0, 20, 20], [20, 10, 120, 60]]
    return write_json(folder / "ReVOS_eval.json", [{**row, "bbox_list": boxes}]), {"images_root": folder / "videos"}


def reasonvos(folder: Path) -> Written:
    names = [f"/data/zero-shot/ReasonVOS/dog/{n}.jpg" for n in range(3)]
    for n in range(3):
        picture(folder / "ReasonVOS" / "dog" / f"{n}.jpg", TALL)
    row = {
        "image_list": names,
        "question": "Who wins the race?",
        "bbox_list": ["[0, 0, 9, 9]", "[1, 1, 9, 9]", "[10, 20, 60, 120]"],
    }
    return write_json(folder / "ReasonVOS_eval.json", [row]), {"images_root": folder, "strip_prefix": "/data/zero-shot"}


def ref_l4_row(**changes: Any) -> dict[str, Any]:
    row = {"id": "000001", "caption": "The red ball on the left.", "bbox": [20.0, 10.0, 100.0, 50.0], "bbox_area": 5000.0}
    row |= {"bbox_id": "b1", "ori_category_id": "o365_1", "image_id": 7, "height": 100, "width": 200}
    return row | {"file_name": "o365/1.jpg", "is_rewrite": False, "split": "val"} | changes


def ref_l4(folder: Path) -> Written:
    picture(folder / "images" / "o365" / "1.jpg")
    path = write_parquet(folder / "ref-l4-val.parquet", [ref_l4_row(), ref_l4_row(id="000002", caption="A ball.")])
    return path, {"images_root": folder / "images", "check_sizes": True}


def odinw_tables() -> dict[str, Any]:
    """Two images; fish in both, a crab in the first, where jellyfish are only a crowd; `creatures` labels nothing."""
    images = [{"id": n, "file_name": f"IMG_{n}.jpg", "height": 100, "width": 200} for n in (0, 1)]
    names = ["creatures", "fish", "crab", "jellyfish"]
    boxes = [(0, 1, [20, 10, 100, 50], 0), (0, 1, [0, 0, 20, 10], 0), (0, 2, [100, 50, 100, 50], 0)]
    boxes += [(0, 3, [0, 0, 200, 100], 1), (1, 1, [20, 10, 20, 10], 0), (1, 3, [40, 20, 20, 10], 0)]
    return {
        "info": {},
        "images": images,
        "categories": [{"id": n, "name": name, "supercategory": "none"} for n, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for n, (image, kind, box, crowd) in enumerate(boxes)
        ],
    }


def odinw(folder: Path) -> Written:
    test = folder / "Aquarium" / "Aquarium Combined.v2-raw-1024.coco" / "test"
    for n in (0, 1):
        picture(test / f"IMG_{n}.jpg")
    path = write_json(test / "annotations_without_background.json", odinw_tables())
    return path, {"dataset": "Aquarium", "absent": 9, "check_sizes": True}


# ---------------------------------------------------------------- multiple choice


def blink_row(**changes: Any) -> dict[str, Any]:
    """A row of the hub's parquet: images embedded, absent ones null."""
    row = {"idx": "val_Art_Style_1", "question": "Which image shares the style of the reference image?", "sub_task": "Art Style"}
    for n, colour in enumerate(("red", "green", "blue"), start=1):
        row[f"image_{n}"] = {"bytes": picture_bytes(colour=colour), "path": f"val_Art_Style_1_image_{n}.jpg"}
    row["image_4"] = None
    row |= {"choices": ["the second image", "the third image"], "answer": "(B)"}
    row["prompt"] = (
        "The first image is the reference image. Which of the second and the third shares its style?\n"
        "Select from the following choices.\n(A) the second image\n(B) the third image\n"
    )
    return row | {"explanation": SECRET, "detailed_image_description": SECRET} | changes


def blink(folder: Path) -> Written:
    path = write_parquet(folder / "Art_Style" / "val-00000-of-00001.parquet", [blink_row()])
    return path, {"images_out": folder / "images"}


def mmiu_row(**changes: Any) -> dict[str, Any]:
    choices = "A: the first image\nB: the second image"
    row = {"task": "forensic_detection_blink", "visual_input_component": "natural image and synthetic image", "source": "blink"}
    row |= {"options": choices, "question": "Which image is most likely to be a real photograph?"}
    row |= {"context": f"You are a judge. Examine the two images.\nSelect from the following choices.\n{choices}\n"}
    names = [f"./Low-level-semantic/forensic_detection_blink/forensic_detection_blink_0_{n}.jpg" for n in (0, 1)]
    return row | {"input_image_path": names, "output": "B"} | changes


def mmiu(folder: Path) -> Written:
    for name in mmiu_row()["input_image_path"]:
        picture(folder / name)
    return write_parquet(folder / "all.parquet", [mmiu_row()]), {}


# ---------------------------------------------------------------- training data of users

GOLD = '<think>The cup is in the second.</think><answer>[{"image": 2, "bbox_2d": [100, 100, 600, 600]}]</answer>'
"""Per mille; on pictures of 200 x 100 pixels the corners are (20, 10) and (120, 60)."""


def _pair(folder: Path) -> list[str]:
    return [picture(folder / "images" / name).relative_to(folder).as_posix() for name in ("a.jpg", "b.jpg")]


def trl(folder: Path) -> Written:
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Find the cup."}]
    row = {"prompt": [{"role": "user", "content": parts}], "images": _pair(folder), "solution": GOLD}
    return write_json(folder / "trl.json", [row]), {"grid": "per_mille"}


def sharegpt(folder: Path) -> Written:
    said = [{"from": "human", "value": "<image><image>Find the cup."}, {"from": "gpt", "value": GOLD}]
    return write_json(folder / "sharegpt.json", [{"conversations": said, "images": _pair(folder)}]), {"grid": "per_mille"}


def migician(folder: Path) -> Written:
    answer = "It's in the second image. <|box_start|>(100,100),(600,600)<|box_end|>"
    said = [{"from": "human", "value": "<image>\n<image>\nFind the cup."}, {"from": "gpt", "value": answer}]
    row = {"type": "group_grounding", "conversations": said, "images": _pair(folder)}
    return write_json(folder / "gg_train_120k.json", [row]), {}


def swift(folder: Path) -> Written:
    said = [{"role": "user", "content": "<image><image>Find <ref-object>."}, {"role": "assistant", "content": "<bbox>"}]
    objects = {"ref": ["the cup"], "bbox": [[20, 10, 120, 60]], "bbox_type": "real", "image_id": [1]}
    return write_json(folder / "swift.json", [{"messages": said, "images": _pair(folder), "objects": objects}]), {}


def verl(folder: Path) -> Written:
    images = [{"bytes": picture_bytes(colour=colour), "path": None} for colour in ("red", "green")]
    row = {"problem": "<image><image>Find the cup.", "answer": GOLD, "images": images}
    return write_parquet(folder / "train.parquet", [row]), {"grid": "per_mille"}


def vlm_r1(folder: Path) -> Written:
    said = [{"from": "human", "value": "<image>Find the cup."}, {"from": "gpt", "value": [20, 10, 120, 60]}]
    path = folder / "vlm_r1.jsonl"
    path.write_text(json.dumps({"id": 1, "image": _pair(folder)[0], "conversations": said}) + "\n", encoding="utf-8")
    return path, {"grid": "pixels"}


def polyground(folder: Path) -> Written:
    box = {"image": 2, "box": [0.1, 0.1, 0.6, 0.6]}
    row = {"key": "cups/0", "task": "cups", "images": _pair(folder), "question": "Find the cup.", "target": {"boxes": [box]}}
    path = folder / "examples.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path, {}


FIXTURES: dict[str, tuple[str, Callable[[Path], Written]]] = {
    "mig_bench": ("mig_bench", mig_bench),
    "mc_bench": ("mc_bench", mc_bench),
    "mc_bench-coco": ("mc_bench", mc_bench_coco),
    "lisa": ("lisa", lisa),
    "llmseg": ("llmseg", llmseg),
    "revos": ("revos", revos),
    "reasonvos": ("reasonvos", reasonvos),
    "ref_l4": ("ref_l4", ref_l4),
    "odinw": ("odinw", odinw),
    "blink": ("blink", blink),
    "mmiu": ("mmiu", mmiu),
    "trl": ("trl", trl),
    "sharegpt": ("sharegpt", sharegpt),
    "migician": ("migician", migician),
    "swift": ("swift", swift),
    "verl": ("verl", verl),
    "vlm_r1": ("vlm_r1", vlm_r1),
    "polyground": ("polyground", polyground),
}
"""Test id to the source and its writer; every writer makes images, and rows without a fault."""
