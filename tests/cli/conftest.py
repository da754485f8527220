"""A fixture that all tests of the command line share."""

from __future__ import annotations

import pytest

from keras_coatnet import cli


@pytest.fixture
def call(capsys):
    """Calls the command line; returns the status, the output and the error stream."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call
