"""Writes the measured tables into docs/reliability.md: `python scripts/write_reliability.py`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "fuzz")]
    import fuzz
    import reliability

    page = ROOT / "docs" / "reliability.md"
    faults = json.loads((ROOT / "docs" / "reliability.json").read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    for name, table in (("faults", reliability.table(faults)), ("fuzzing", fuzz.table(fuzz.read_results(fuzz.RESULTS)))):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, shown=table: f"{found[1]}{shown}\n{found[2]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
