"""What is ours of the clients' making, with no broker."""

from __future__ import annotations

import selectors
import socket

import pytest

from forecaster.kafka.clients import Selector


def test_the_selector_knows_what_the_standard_one_knows() -> None:
    """A socket's key comes by the socket and by its number, after it was closed too; and no other's."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Selector() as selector:
        key = selector.register(ours, selectors.EVENT_READ)
        assert selector.get_key(ours) == selector.get_key(ours.fileno()) == key
        ours.close()
        assert selector.get_key(ours) == key
        assert selector.unregister(ours) == key
        with pytest.raises(ValueError, match="Invalid file descriptor"):
            selector.get_key(ours)


def test_the_selector_does_not_spell_out_a_socket_that_it_does_not_know() -> None:
    """The client asks for each socket before each wait: the error names a number, and no addresses."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Selector() as selector, pytest.raises(KeyError) as raised:
        selector.get_key(ours)
    assert "socket" not in str(raised.value)
