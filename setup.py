"""Everything is declared in pyproject.toml; this file lets older front ends find the build."""

from setuptools import setup

setup()
