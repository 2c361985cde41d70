"""Settings of every test: two cores are shared with other work, so one thread each and no deadline per example."""

from __future__ import annotations

import os

# Before anything imports numpy or torch, which read it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import HealthCheck, settings

settings.register_profile("polyground", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("polyground")
