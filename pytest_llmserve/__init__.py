"""A pytest plugin that serves language models, puts them under load and gives a verdict."""

from __future__ import annotations
