"""Coverage-guided fuzzing of what reads hostile input, in slices that add up: seconds and executions are kept in a JSON file.

    python fuzz/fuzz.py --seconds 600                # 600 s more, in turns over all targets; run it again for more
    python fuzz/fuzz.py --seconds 60 --target report
    python fuzz/fuzz.py --replay FILE --target answer

Needs atheris (`pip install atheris`; Linux and macOS). The corpus lies in `build/fuzz`, findings in `build/fuzz/found`: mend what
they show, then keep them under `fuzz/cases/TARGET` with a name that says what they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CASES = HERE / "cases"
RESULTS = HERE / "results.json"
WORK = ROOT / "build" / "fuzz"

MEMORY = Path("/dev/shm")
"""Where inputs are written to be read again, where there is such a place."""

NAMES = ("answer", "sources", "config", "report")
LONGEST = {"answer": 4096, "sources": 8192, "config": 4096, "report": 1024}
"""Bytes of an input."""
SLOW = 120
"""Seconds of one input, by the clock on the wall, that count as a hang; a busy machine takes far more than an input needs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="of all slices of this call together")
    parser.add_argument("--slice", type=int, default=120, help="seconds of one target before the next has its turn")
    parser.add_argument("--target", choices=NAMES, action="append")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--replay", type=Path, help="run one input and show what it raises")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    found = parser.parse_args()
    names = found.target or list(NAMES)
    if found.replay is not None:
        return replay(names[0], found.replay)
    if found.child is not None:
        fuzz(names[0], seconds=found.child)
    return campaign(names, seconds=found.seconds, turn=found.slice, results=found.results)


def campaign(names: list[str], *, seconds: int, turn: int, results: Path) -> int:
    """Slice after slice; what each came to is written down at its end. 1 where anything was found."""
    left, worst = seconds, 0
    while left > 0:
        told = read_results(results)
        # The target that has had the least.
        name = min(names, key=lambda name: told["targets"].get(name, {}).get("seconds", 0))
        length = min(turn, left)
        since = time.monotonic()
        busy = cpu_seconds()
        executions, finding = one_slice(name, length)
        spent, busy = round(time.monotonic() - since), round(cpu_seconds() - busy)
        add(told, name, seconds=spent, cpu_seconds=busy, executions=executions, finding=finding)
        results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(
            f"{name}: {spent} s ({busy} of a core), {executions:,} executions" + (f"; FOUND {finding}" if finding else ""),
            flush=True,
        )
        worst |= finding is not None
        left -= max(length, spent)
    return worst


def table(told: Mapping[str, Any]) -> str:
    """What the slices came to so far, as Markdown."""
    lines = ["| what is fuzzed | time | of a core | executions | found and mended |", "| --- | --: | --: | --: | --: |"]
    rows = told["targets"]
    for name in NAMES:
        row = rows.get(name, {"seconds": 0, "cpu_seconds": 0, "executions": 0, "findings": []})
        lines.append(_line(name, [row["seconds"], row["cpu_seconds"]], row["executions"], len(row["findings"])))
    times = [sum(row[key] for row in rows.values()) for key in ("seconds", "cpu_seconds")]
    executions, found = sum(row["executions"] for row in rows.values()), sum(len(row["findings"]) for row in rows.values())
    return "\n".join([*lines, _line("**together**", times, executions, found)])


def _line(name: str, seconds: list[int], executions: int, found: int) -> str:
    minutes = " | ".join(f"{value / 60:.1f} min" for value in seconds)
    return f"| {name} | {minutes} | {executions:,} | {found} |"


def read_results(path: Path) -> dict[str, Any]:
    if path.is_file():
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return told
    return {"command": "python fuzz/fuzz.py --seconds N", "targets": {}}


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def add(
    told: dict[str, Any], name: str, *, seconds: int, cpu_seconds: int, executions: int, finding: Mapping[str, str] | None
) -> None:
    row = told["targets"].setdefault(name, {"seconds": 0, "cpu_seconds": 0, "executions": 0, "slices": 0, "findings": []})
    row["seconds"] += seconds
    row["cpu_seconds"] += cpu_seconds
    row["executions"] += executions
    row["slices"] += 1
    if finding is not None and finding["what"] not in [known["what"] for known in row["findings"]]:
        row["findings"].append(dict(finding))


def one_slice(name: str, seconds: int) -> tuple[int, dict[str, str] | None]:
    """Executions, and what was found, of one process of the fuzzer."""
    found = WORK / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    command = [sys.executable, str(Path(__file__).resolve()), "--target", name, "--child", str(seconds)]
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
        environment = {**os.environ, "TMPDIR": scratch}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=WORK, env=environment, check=False)
    output = done.stdout + done.stderr
    counted = re.findall(r"stat::number_of_executed_units:\s*(\d+)", output) or re.findall(r"^#(\d+)\s", output, re.MULTILINE)
    executions = int(counted[-1]) if counted else 0
    new = sorted(set(found.iterdir()) - before)
    if done.returncode == 0:
        return executions, None
    if not counted and not new:
        raise SystemExit(f"the fuzzer did not start:\n{output[-3000:]}")
    raised = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Broken|Exception)\b.*)$", output, re.MULTILINE)
    what = raised[-1][:300] if raised else f"ended with status {done.returncode}"
    return executions, {"what": what, "file": new[-1].name if new else ""}


def fuzz(name: str, *, seconds: int) -> None:
    """Never returns."""
    import atheris

    # Whose branches count; what they stand on (json, PyYAML, pydantic, Jinja) is not ours to mend.
    with atheris.instrument_imports(include=["polyground", "targets"]):
        sys.path.insert(0, str(HERE))
        from targets import TARGETS
    corpus = WORK / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = WORK / "seeds" / name
    write_seeds(name, seeds)
    words = WORK / f"{name}.dict"
    words.write_text("".join(f'"{_quoted(word)}"\n' for word in vocabulary(name)), encoding="ascii")
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST[name]}",
        f"-timeout={SLOW}",
        f"-dict={words}",
        f"-artifact_prefix={WORK / 'found' / name}/",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
        str(corpus),
        str(seeds),
        *([str(CASES / name)] if (CASES / name).is_dir() else []),
    ]
    mutators = {"sources": _mutate_json}
    custom = {"custom_mutator": mutators[name]} if name in mutators else {}
    atheris.Setup([sys.argv[0], *options], TARGETS[name], **custom)
    atheris.Fuzz()


def replay(name: str, path: Path) -> int:
    sys.path.insert(0, str(HERE))
    from targets import TARGETS, clear_scratch

    try:
        TARGETS[name](path.read_bytes())
    finally:
        clear_scratch()
    print(f"{path}: nothing wrong")
    return 0


# ---------------------------------------------------------------- where it starts


def write_seeds(name: str, folder: Path) -> None:
    """Good inputs of every kind, each under the hash of its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS[name]():
        (folder / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)


def _answer_seeds() -> list[bytes]:
    texts = [
        '<think>a</think><answer>[{"image": 2, "bbox_2d": [100, 200, 500, 750]}]</answer>',
        '<answer>[{"image": 1, "bbox_2d": [1.5, 2, 50, 75], "confidence": 0.5}, {"image": 2, "bbox_2d": [0, 0, 9, 9]}]</answer>',
        "<think>a</think><answer>B</answer>",
        "<answer>[]</answer>",
        '```json\n[{"bbox_2d": [10, 20, 300, 400], "label": "cup"}]\n```',
        "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>",
        "<ref>cup</ref><box>[[10, 20, 300, 400]]</box>",
        "It is in the second image. (B)",
    ]
    heads = ["- 3 0", "qwen_json 2 1", "qwen_tokens 1 0", "internvl 1 1", "any 2 0"]
    return [f"{head}\n{text}".encode() for head in heads for text in texts]


def _source_seeds() -> list[bytes]:
    """The fixtures of the tests; of those in parquet, their rows as JSON lines."""
    sys.path.insert(0, str(ROOT / "tests" / "sources"))
    from source_fixtures import FIXTURES

    from polyground.sources.reading import stream_rows

    seeds = []
    for source, write in FIXTURES.values():
        with tempfile.TemporaryDirectory() as folder:
            path, options = write(Path(folder))
            if path.suffix == ".parquet":
                # What is no JSON (embedded images) becomes null: the readers meet both.
                rows = [json.dumps(row, default=lambda _: None) for _, row in stream_rows(path)]
                layout, body = "lines", "\n".join(rows)
            else:
                layout, body = "lines" if path.suffix == ".jsonl" else "list", path.read_text(encoding="utf-8")
            simple = {key: value for key, value in options.items() if isinstance(value, str)}
            body = body.replace(folder, "images").replace('"path": null', '"path": "images/a.jpg"')
            if body.startswith(("[", "{")) and layout == "list":
                body = json.dumps(json.loads(body))
            words = "".join(f" {key}={value}" for key, value in simple.items())
            seeds.append(f"{source} {layout}{words}\n{body}".encode())
    return seeds


def _config_seeds() -> list[bytes]:
    seeds = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    seeds = [seed for seed in seeds if len(seed) < LONGEST["config"]]
    seeds += [
        b"name: x\nseed: 1\n\0--learning_rate\x001e-4",
        b"\0--sft.max_steps=3\0rewards.0.weight=2",
        b"rewards: [{name: iou}]\n",
    ]
    return [*seeds, b"data: {test: [{source: mig_bench, path: a.json, options: {limit: 3}}]}\n", b"a: &x [1]\nb: *x\n"]


def _report_seeds() -> list[bytes]:
    hostile = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</pre></style>",
        "{{ 7*7 }}",
        "&lt;b&gt;",
        "]]>",
        "é",
    ]
    return ["\0".join([text] * 10).encode() for text in ["x", *hostile]] + ["\0".join(hostile).encode()]


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "answer": _answer_seeds,
    "sources": _source_seeds,
    "config": _config_seeds,
    "report": _report_seeds,
}


def vocabulary(name: str) -> list[str]:
    """Words that chance would seldom write."""
    words = {word for seed in SEEDS[name]() for word in re.findall(r"[A-Za-z_0-9<>/|-]{3,40}", seed.decode("utf-8", "replace"))}
    if name == "config":
        from polyground.config import Recipe, dump_recipe

        words |= set(re.findall(r"[a-z_]{3,40}", dump_recipe(Recipe())))
        words |= {"!!python/object", "&a", "*a", "<<:", ".inf", ".nan", "0x10", "2026-01-01", "1:30"}
    words |= {"\\ud800", "\\u0000", "1e999", "-0.0", "NaN", "Infinity", "1e400", "../", "\x1b[2J"}
    return sorted(words)[:2000]


def _quoted(word: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\x{ord(c):02x}" for c in word if ord(c) < 256)


JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    10**400,
    1e308,
    float("nan"),
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "<box>",
    "<image>",
    "A",
]
JUNK += ["\0", "\ud800", "\x1b[2J", [], [[]], [None], {}, {"a": 1}, [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4], "(1,2),(3,4)"]


def _mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Most often a value, a key or the order of a row is changed, so that what comes out is still JSON; else bytes."""
    import atheris

    rng = random.Random(seed)
    head, newline, body = data.partition(b"\n")
    if newline and rng.random() < 0.75:
        lines = b" lines" in head
        try:
            parts = [json.loads(line) for line in body.splitlines()] if lines else [json.loads(body)]
        except (ValueError, RecursionError):
            parts = []
        if parts:
            index = rng.randrange(len(parts))
            for _ in range(rng.randint(1, 3)):
                parts[index] = _changed(parts[index], rng)
            try:
                text = "\n".join(json.dumps(part) for part in parts).encode()
            except (ValueError, RecursionError):
                text = body
            if len(head) + 1 + len(text) <= max_size:
                return head + b"\n" + text
    mutated: bytes = atheris.Mutate(data, max_size)
    return mutated


def _changed(value: Any, rng: random.Random) -> Any:
    """One node of the tree replaced, removed, doubled or bent."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, rng.choice([*map(str, value), "x"]): value[key]}
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return [*value[: at + 1], *value[at:]]
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value) + 1)
        piece = rng.choice(["", *[junk for junk in JUNK if isinstance(junk, str)], value])
        return value[:at] + piece + value[min(len(value), at + rng.randint(0, 3)) :]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12 and rng.random() < 0.5:
        return rng.choice([-value, value * 10, value / 1000, value + 1, value - 1, str(value), int(value)])
    return rng.choice(JUNK)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    WORK.mkdir(parents=True, exist_ok=True)
    raise SystemExit(main())
