"""First come, first served, within rows, pages and a step's budget; prompts in few shapes."""

import itertools

import pytest

from jaxattn.sampling import SamplingParams, row_of
from serving.buckets import bucket_of, geometric, make_buckets, split_rows
from serving.request import Request, Sequence
from serving.scheduler import Scheduler

PAGE_SIZE = 8


def make_scheduler(num_rows=4, num_pages=33, max_batch_tokens=1024):
    buckets = make_buckets(num_rows, 256, max_batch_tokens)
    return Scheduler(num_rows=num_rows, num_pages=num_pages, page_size=PAGE_SIZE, buckets=buckets)


def make_sequence(prompt_length=8, max_tokens=1):
    params = SamplingParams(max_tokens=max_tokens)
    request = Request("r", None, [0] * prompt_length, params)
    options = {"max_tokens": max_tokens, "eos_token_ids": frozenset(), "tokenizer": None}
    return Sequence(request, 0, **options, sampling=row_of(params, seed=0))


def add(scheduler, *sequences):
    for sequence in sequences:
        scheduler.add(sequence)


def test_the_queue_is_served_in_order_while_rows_last():
    scheduler = make_scheduler(num_rows=2)
    first, second, third = (make_sequence() for _ in range(3))
    add(scheduler, first, second, third)
    assert scheduler.admit() == [first, second]
    assert (first.row, second.row) == (0, 1)
    assert scheduler.admit() == []
    scheduler.release(first)
    assert scheduler.admit() == [third]
    assert third.row == 0


def test_the_head_of_the_queue_waits_for_pages_and_nobody_overtakes_it():
    scheduler = make_scheduler(num_pages=9)
    running, large, small = make_sequence(40), make_sequence(32), make_sequence(8)
    add(scheduler, running, large, small)
    assert scheduler.admit() == [running]
    assert scheduler.free_pages == 3
    assert scheduler.admit() == []
    scheduler.release(running)
    assert scheduler.admit() == [large, small]


def test_a_sequence_reserves_every_page_it_can_come_to_own():
    scheduler = make_scheduler()
    assert scheduler.reservation(make_sequence(8, max_tokens=1)) == 1  # its one new token is never written
    assert scheduler.reservation(make_sequence(8, max_tokens=2)) == 2
    assert scheduler.reservation(make_sequence(1, max_tokens=16)) == 2
    assert scheduler.reservation(make_sequence(1, max_tokens=17)) == 3


def test_what_can_never_fit_is_refused_with_the_numbers():
    scheduler = make_scheduler(num_pages=5)
    scheduler.check_fits(30, 3)
    with pytest.raises(ValueError, match=r"30 prompt tokens and up to 4 new ones need 5 pages of 8.*has 4"):
        scheduler.check_fits(30, 4)


def test_a_step_takes_on_no_more_prompt_tokens_than_its_budget():
    scheduler = make_scheduler(num_rows=8, max_batch_tokens=100)
    sequences = [make_sequence(30) for _ in range(5)]
    add(scheduler, *sequences)
    assert scheduler.admit() == sequences[:3]
    assert scheduler.admit() == sequences[3:]


def test_a_prompt_above_the_budget_still_runs_alone():
    scheduler = make_scheduler(num_rows=8, max_batch_tokens=100)
    long, short = make_sequence(200), make_sequence(8)
    add(scheduler, long, short)
    assert scheduler.admit() == [long]
    assert scheduler.plan_prefills([long]) == [(1, 256, [long])]


def test_a_waiting_sequence_can_be_discarded():
    scheduler = make_scheduler()
    first, second = make_sequence(), make_sequence()
    add(scheduler, first, second)
    scheduler.discard(first)
    assert scheduler.admit() == [second]


def test_prefills_group_prompts_of_one_length_bucket():
    scheduler = make_scheduler(num_rows=16)
    lengths = [5, 100, 32, 33, 7, 120]
    sequences = [make_sequence(length) for length in lengths]
    plan = scheduler.plan_prefills(sequences)
    by_id = {id(s): n for s, n in zip(sequences, lengths, strict=True)}
    assert [(rows, length, [by_id[id(s)] for s in group]) for rows, length, group in plan] == [
        (4, 32, [5, 32, 7]),
        (1, 128, [100]),
        (1, 128, [120]),
        (1, 64, [33]),
    ]


def test_the_decode_bucket_holds_the_highest_row():
    scheduler = make_scheduler(num_rows=8)
    sequences = [make_sequence() for _ in range(5)]
    add(scheduler, *sequences)
    scheduler.admit()
    assert scheduler.decode_rows() == 8
    for sequence in sequences[1:]:
        scheduler.release(sequence)
    assert scheduler.decode_rows() == 1


def test_geometric_ends_with_its_most():
    assert geometric(1, 256, 4) == (1, 4, 16, 64, 256)
    assert geometric(32, 200, 2) == (32, 64, 128, 200)
    assert geometric(5, 5, 2) == (5,)
    assert bucket_of(33, (32, 64, 128)) == 64
    assert bucket_of(64, (32, 64, 128)) == 64


@pytest.mark.parametrize("buckets", [(1,), (1, 4, 16, 64), (1, 4, 10)])
def test_splits_cover_all_rows_with_less_than_half_of_padding(buckets):
    for num_rows in range(1, 150):
        counts = split_rows(num_rows, buckets)
        assert sum(counts) == num_rows
        assert all(count > bucket_of(count, buckets) / 2 for count in counts)


def test_every_planned_prefill_is_among_the_shapes_that_warm_up_compiles():
    scheduler = make_scheduler(num_rows=16, num_pages=2000)
    shapes = set(scheduler.buckets.prefill_shapes())
    for count, length in itertools.product(range(1, 17), (1, 31, 32, 33, 100, 200, 255)):
        for rows, bucket, group in scheduler.plan_prefills([make_sequence(length) for _ in range(count)]):
            assert (rows, bucket) in shapes
            assert rows == 1 or rows * bucket <= scheduler.buckets.max_batch_tokens
            assert len(group) <= rows
