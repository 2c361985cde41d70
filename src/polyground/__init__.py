"""Reinforcement-learning post-training for multi-image grounding (after arXiv 2507.00748)."""

__version__ = "0.1.0"
