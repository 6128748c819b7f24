"""Numbers in tables."""

from __future__ import annotations

import pytest

from timm_fisher.training.tables import three_digits


@pytest.mark.parametrize(
    ('value', 'text'),
    [(0.08164, '0.0816'), (1.0, '1.00'), (99.94, '99.9'), (99.96, '100'), (1234.5, '1234')],
)
def test_three_digits(value, text):
    assert three_digits(value) == text
