"""Limits of time for tests of hostile input."""

import signal
from contextlib import contextmanager


@contextmanager
def within(seconds):
    """Fail what takes longer, also inside a regular expression.

    Not by pytest's own time-out, of which there is none: a test that hangs must not hang the rest.
    """

    def stop(*_):
        raise AssertionError(f'it takes more than {seconds} seconds')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
