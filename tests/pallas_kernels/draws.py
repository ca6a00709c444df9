"""Random calls: a seed chooses shapes and features, which are compiled once, and each of its draws what the
call takes at run time.

JAXATTN_RANDOM_SEED: the first seed. JAXATTN_RANDOM_DRAWS: draws of a seed, of which the first is drawn with
the shapes; by default 1 where kernels are interpreted, each anew, and 8 on a GPU, where compiling takes most
of the time.
"""

import math
import os
from collections.abc import Callable

FIRST = int(os.environ.get("JAXATTN_RANDOM_SEED", "0"))
NUM_INTERPRETED, NUM_ON_GPU = (int(os.environ.get("JAXATTN_RANDOM_DRAWS", default)) for default in ("1", "8"))


def poison_of(draw: int) -> float:
    """What lies where no row may look: NaN, in every fourth draw a number. A row that should see nothing may
    end as if it did when it reads NaN, not when it reads a number.
    """
    return 50.0 if draw % 4 == 3 else math.nan


def check_draws(seed: int, num_draws: int, check: Callable[[int], None]) -> None:
    """check(draw) for each; the first line of a failure says of which."""
    assert num_draws > 0, (
        f"JAXATTN_RANDOM_DRAWS must be at least 1, got {num_draws}: nothing would be checked"
    )
    for draw in range(num_draws):
        try:
            check(draw)
        except Exception as error:
            raise AssertionError(f"seed {seed}, draw {draw}: {error}") from error
