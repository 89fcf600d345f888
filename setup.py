"""Metadata and dependencies live in pyproject.toml; this serves tools that still ask for a setup.py."""

from setuptools import setup

setup()
