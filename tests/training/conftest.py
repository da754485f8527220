"""Fixtures of the tests of training."""

import socket

import pytest


@pytest.fixture
def no_network(monkeypatch):
    """Whatever in this process asks for another machine, fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
