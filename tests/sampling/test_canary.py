"""The API key of a served teacher: wherever things go wrong, it stands in no file, no log and no message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from fault_server import serving

from polyground.cli import main
from polyground.config import load_recipe, show_recipe

KEY, PASSWORD = "sk-canary-7f3a9b2c4d5e6f70", "hunter2canary"
TEXT = '<think>Image 1 shows it quite well.</think><answer>[{"image": 1, "bbox_2d": [0, 0, 1000, 1000]}]</answer>'
FAULTS = ["429", "500", "garbage", "half", "dies", "html", "no-choices"]
"""Met in this order; a status quotes the key that it was sent."""


def write_recipe(folder: Path, url: str) -> Path:
    sizes = {"train": 6, "rl": 0, "validation": 0, "test": 0, "ood": 0, "perception": 0}
    endpoint = {"concurrency": 1, "retries": 9, "check_prompt_tokens": False}
    synthesize = {"teacher": "endpoint", "teacher_base_url": url, "teacher_model": "m", "pass_iou": 1e-6, "endpoint": endpoint}
    path = folder / "recipe.yaml"
    tree = {"out": str(folder / "run"), "world": sizes, "synthesize": {**synthesize, "api_key_env": "TEACHER_KEY"}}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def everything(folder: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_key_is_nowhere_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    caplog.set_level("DEBUG", logger="polyground")
    with serving([*FAULTS], text=TEXT) as server:
        url = server.url.replace("http://", f"http://user:{PASSWORD}@") + f"?key={PASSWORD}"
        recipe = write_recipe(tmp_path, server.url)
        assert main(["world", str(recipe)]) == 0
        assert main(["synthesize", str(recipe)]) == 0
        assert any(KEY in value for headers in server.headers for value in headers.values())
        # Each ends at once, with a message that names the trouble.
        for number, status in enumerate(("401", "403", "404", "400", "429 insufficient_quota")):
            server.script = [status] * 9
            again = [str(recipe), f"--out={tmp_path / 'run'}", f"--synthesize.limit={number + 1}", f"--seed={number + 1}"]
            main(["synthesize", *again])
        server.script = ["500"] * 40
        main(["synthesize", str(recipe), "--seed=9", f"--synthesize.teacher_base_url={url}", "--synthesize.endpoint.retries=0"])
    assert main(["report", str(recipe), f"--synthesize.teacher_base_url={url}"]) == 0
    assert main(["run", str(recipe), f"--synthesize.teacher_base_url={url}", "--dry-run"]) == 0
    said = capfd.readouterr()
    told = said.out + said.err + caplog.text
    assert "report.html" in told
    kept = everything(tmp_path / "run")
    assert b"quite well" in kept
    assert b"127.0.0.1" in kept  # the page shows the address
    for secret in (KEY, PASSWORD):
        assert secret not in told
        assert secret.encode() not in kept


def test_a_key_in_place_of_its_name_is_refused_unseen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, "http://127.0.0.1:9/v1")
    assert main(["synthesize", str(recipe), f"--synthesize.api_key_env={KEY}"]) == 2
    said = capfd.readouterr().err
    assert "synthesize.api_key_env" in said
    assert KEY not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        pytest.param("https://user:secret@host:8000/v1", "https://host:8000/v1", id="user"),
        pytest.param("https://host/v1?key=secret&x=1", "https://host/v1", id="query"),
        pytest.param("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", id="plain"),
    ],
)
def test_a_shown_recipe_has_addresses_without_secrets(tmp_path: Path, url: str, shown: str) -> None:
    recipe = load_recipe(write_recipe(tmp_path, url))
    told = yaml.safe_load(show_recipe(recipe))
    assert told["synthesize"]["teacher_base_url"] == shown
    assert told["synthesize"]["teacher_model"] == "m"
