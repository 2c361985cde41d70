"""What comes from elsewhere moves no cursor, opens no archive, runs no code, and gets to see no key."""

from __future__ import annotations

import ast
import logging
import pickle
from pathlib import Path

import pytest

import polyground
from polyground.cli import main
from polyground.errors import visible
from polyground.sources.reading import BadRow, require_none_bad

SOURCES = sorted(Path(polyground.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("plain é 日本 🙂", "plain é 日本 🙂", id="plain"),
        pytest.param("\x1b[2J\x07", "\\x1b[2J\\x07", id="escape"),
        pytest.param("a\rb\nc\td", "a\\rb\\nc\\td", id="lines"),
        pytest.param("\x9b31m", "\\x9b31m", id="one-byte-escape"),
        pytest.param("\u202eabc\u2066", "\\u202eabc\\u2066", id="direction"),
        pytest.param("\u2028\u2029", "\\u2028\\u2029", id="other-line-ends"),
        pytest.param("\ud800", "\\ud800", id="half-a-pair"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_an_error_shows_a_hostile_annotation_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('name: x\n"evil\\e[2Jkey": 1\n', encoding="utf-8")
    assert main(["world", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "evil\\x1b[2Jkey is not a known key" in said
    assert "\x1b" not in said


def test_a_log_line_shows_hostile_text_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert logging.lastResort is not None
    record = logging.LogRecord("polyground", logging.WARNING, "", 0, "%s said %s", ("server", "\x1b]0;title\x07"), None)
    assert logging.lastResort.format(record) == "server said \\x1b]0;title\\x07"


def test_a_bad_row_forges_no_line(tmp_path: Path) -> None:
    with pytest.raises(polyground.errors.DataError) as raised:
        require_none_bad([BadRow(1, "k\npolyground: done", "malformed", "x\r\ny")], tmp_path / "rows.json")
    assert str(raised.value).splitlines()[1:] == ["  row 1 (k\\npolyground: done): x\\r\\ny"]


# Unpacking, unpickling, running: the modules and the calls that could. Nothing here unpacks archives; users are told to.
FORBIDDEN = {"tarfile", "zipfile", "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_unpacked_unpickled_or_run(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported & FORBIDDEN == set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in {"eval", "exec", "os.system", "shutil.unpack_archive"}, f"{path}:{call.lineno}"
        if name == "torch.load":
            assert words.get("weights_only") == "True", f"{path}:{call.lineno}"
        assert words.get("trust_remote_code", "False") == "False", f"{path}:{call.lineno}"
        assert words.get("shell", "False") == "False", f"{path}:{call.lineno}"


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def test_a_pickle_in_place_of_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    from polyground.errors import ModelError
    from polyground.models import load_model
    from toys import write_toy

    model, mark = write_toy(tmp_path / "model"), tmp_path / "mark"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ModelError, match="only pickled weights"):
        load_model(model)
    assert not mark.exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # as it would have been
