"""What the dependency audit makes of what pip-audit says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit_dependencies.py"


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit_dependencies", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(*vulnerabilities: dict) -> str:
    packages = [{"name": "a", "version": "1", "vulns": list(vulnerabilities)}, {"name": "local", "skip_reason": "not on PyPI"}]
    return json.dumps({"dependencies": packages, "fixes": []})


KNOWN = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}


def test_a_vulnerability_fails_and_is_named(audit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge(told(KNOWN), "") == 1
    assert "a 1: PYSEC-1; mended in 1.1" in capsys.readouterr().out


def test_an_accepted_advisory_passes(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(audit.ACCEPTED, "CVE-1", "not reached from here")
    assert audit.judge(told(KNOWN), "") == 0


def test_nothing_found_passes(audit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge(told(), "") == 0
    assert "1 packages asked about, 0 vulnerabilities" in capsys.readouterr().out


def test_a_mirror_that_knows_no_package_is_said_and_no_failure(audit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = {"name": "a", "skip_reason": "Dependency not found on PyPI and could not be audited: a (1)"}
    assert audit.judge(json.dumps({"dependencies": [skipped]}), "") == 0
    assert "NOT DONE, the advisory service knows none of the 1 packages: Dependency not found" in capsys.readouterr().out


def test_a_service_that_cannot_be_reached_is_said_and_no_failure(audit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge("", "Traceback …\nConnectionError: no route to pypi.org\n") == 0
    assert "NOT DONE, the advisory service gave no answer: ConnectionError: no route" in capsys.readouterr().out
