"""Kernels that show, and use, where post-training moves a language model's weights."""

__version__ = "0.1.0"
