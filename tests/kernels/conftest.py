"""The tests of the kernels use them also where the rest of the suite runs with SDTUNE_KERNELS=off."""

import pytest


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    monkeypatch.setenv("SDTUNE_KERNELS", "on")
