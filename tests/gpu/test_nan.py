"""What is not finite where rows look comes through the kernels on a Hopper GPU."""

import os

import pytest

from tests.pallas_kernels.nan_cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("JAXATTN_TEST_GPU") != "1", reason="needs a Hopper GPU"),
]


@pytest.mark.parametrize("name", CASES)
def test_nan_is_not_hidden(name):
    CASES[name](is_interpreted=False)
