"""Tests that are marked slow run last, and those that are marked long only with --long."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if not config.getoption("long"):
        skip = pytest.mark.skip(reason="takes minutes: run launch/test.sh --long")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
