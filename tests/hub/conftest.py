"""Saved models that tests of loading damage."""

import pytest
from saved_models import copy, write_originals


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """A saved model of each of some heads."""
    return write_originals(tmp_path_factory.mktemp('originals'))


@pytest.fixture
def saved(originals, tmp_path):
    """A saved model that a test may damage."""
    return copy(originals / 'sparse_fisher', tmp_path / 'saved')
