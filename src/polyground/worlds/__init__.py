"""Synthetic worlds: drawn scenes, the language about them, and the questions asked of them."""
