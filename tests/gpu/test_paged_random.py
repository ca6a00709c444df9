"""paged_attention's Hopper kernels on random tables, lengths, page sizes, groups and combinations of
features, against the reference in fp32; free pages are poisoned and tables end in garbage.

JAXATTN_RANDOM_CASES sets how many are compiled (JAXATTN_RANDOM_SEED: from where on), JAXATTN_RANDOM_DRAWS
with how many draws of pages, tables, lengths and divisions into rows each is checked.
"""

import os

import pytest

from tests.gpu import test_paged_attention, test_paged_prefill
from tests.pallas_kernels.draws import FIRST, NUM_ON_GPU, check_draws
from tests.pallas_kernels.paged_inputs import make_case
from tests.pallas_kernels.paged_random import draw, redraw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("JAXATTN_TEST_GPU") != "1", reason="needs a Hopper GPU"),
]
CASES = range(FIRST, FIRST + int(os.environ.get("JAXATTN_RANDOM_CASES", "200")))


@pytest.mark.parametrize("seed", CASES)
def test_random_call(seed):
    first = draw(seed, max_rows=20, max_keys=9000, max_queries=1500)
    check_draws(seed, NUM_ON_GPU, lambda number: check_call(redraw(first, number), has_config=seed % 2 > 0))


def check_call(call, has_config):
    """has_config: prefill has the call's own, not the default."""
    case, features = make_case(**call.shapes), dict(call.features)
    per_head = tuple(name for name in ("sinks", "alibi_slopes") if features.pop(name, 1) is None)
    arguments = {"pages": call.pages, "per_head": per_head, "config": call.decode, **features}
    if call.prefill is None:
        test_paged_attention.check_on_gpu(case, call.dtype, **arguments)
        return
    if has_config:
        arguments["prefill_config"] = call.prefill
    test_paged_prefill.check_on_gpu(case, call.dtype, call.padding, **arguments)
