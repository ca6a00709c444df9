"""Ctrl-C waits for the end of what must not be cut off."""

import os
import signal
import threading

import pytest

from serving.interrupts import uninterrupted


def interrupt_self():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_comes_at_the_end():
    finished = []

    def interrupted_inside():
        with uninterrupted():
            interrupt_self()
            finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted_inside()
    assert finished == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_one_nothing_happens():
    with uninterrupted():
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupt_self()


def test_other_threads_pass_through():
    passed = []

    def run():
        with uninterrupted():
            passed.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert passed == [True]
