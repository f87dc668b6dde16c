"""Wardround: hospitals pretrain one imaging backbone together; no image leaves a hospital."""

__version__ = "0.1.0"
