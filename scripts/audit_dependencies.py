"""Look the installed packages up in the advisory database; 1 where one has a known vulnerability that is not accepted below.

Where the database cannot be reached nothing is known: that is said, and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

ACCEPTED: dict[str, str] = {}
"""Advisories that do not concern us, by id, and why."""

COMMAND = (sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off", "--format", "json")


def main() -> int:
    """0 for none found and for none asked."""
    done = subprocess.run([*COMMAND, "--timeout", "15"], capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if "No module named" in done.stderr and "pip_audit" in done.stderr:
        print("audit: pip-audit is not installed; `make install` brings it")
        return 1
    return judge(done.stdout, done.stderr)


def judge(output: str, errors: str) -> int:
    """Say what pip-audit found, or that it could not ask."""
    try:
        told = json.loads(output)
    except ValueError:
        last = next((line for line in reversed(errors.strip().splitlines()) if line.strip()), "it said nothing")
        print(f"audit: NOT DONE, the advisory service gave no answer: {last[:300]}")
        return 0
    packages = told["dependencies"]
    asked = sum("skip_reason" not in package for package in packages)
    if not asked:
        why = next((str(package["skip_reason"]) for package in packages), "no package is installed")
        print(f"audit: NOT DONE, the advisory service knows none of the {len(packages)} packages: {why[:200]}")
        return 0
    found = list(vulnerabilities(packages))
    for line in found:
        print(f"audit: {line}")
    print(f"audit: {asked} packages asked about, {len(found)} vulnerabilities, {len(ACCEPTED)} advisories accepted")
    return int(bool(found))


def vulnerabilities(packages: list[Mapping[str, Any]]) -> Iterator[str]:
    for package in packages:
        for known in package.get("vulns", ()):
            if not {known["id"], *known.get("aliases", ())} & ACCEPTED.keys():
                mended = ", ".join(known.get("fix_versions", ())) or "no version yet"
                yield f"{package['name']} {package['version']}: {known['id']}; mended in {mended}"


if __name__ == "__main__":
    raise SystemExit(main())
