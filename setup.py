"""Supports tools that need this file. All settings are in pyproject.toml."""

from setuptools import setup

setup()
