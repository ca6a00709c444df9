"""Where a sequence ends, and the text it has then."""

import pytest

from jaxattn.sampling import SamplingParams, row_of
from jaxattn.tokenizer import ByteTokenizer
from serving.request import Request, Sequence

EOS = 256


def make_sequence(*, stream=False, max_tokens=100, **params):
    params = SamplingParams(max_tokens=max_tokens, **params)
    request = Request("r", "prompt", [1], params, stream)
    sequence = Sequence(
        request,
        0,
        max_tokens=max_tokens,
        eos_token_ids=frozenset([EOS]),
        tokenizer=ByteTokenizer(),
        sampling=row_of(params, seed=0),
    )
    request.sequences.append(sequence)
    return sequence


def feed(sequence, text, *tokens):
    """Appends tokens until the sequence ends."""
    for token in [*text.encode(), *tokens]:
        if sequence.finish_reason is None:
            sequence.append(token)
    return sequence.output()


def test_it_ends_with_its_last_token():
    output = feed(make_sequence(max_tokens=3), "abcdef")
    assert (output.text, output.finish_reason, output.stop_reason) == ("abc", "length", None)
    assert output.token_ids == list(b"abc")


def test_the_end_of_sequence_is_a_token_without_text():
    output = feed(make_sequence(), "abc", EOS, 1)
    assert (output.text, output.finish_reason, output.stop_reason) == ("abc", "stop", None)
    assert output.token_ids[-1] == EOS


def test_the_end_of_sequence_can_be_ignored():
    output = feed(make_sequence(ignore_eos=True, max_tokens=5), "abc", EOS, ord("d"))
    assert (output.finish_reason, len(output.token_ids)) == ("length", 5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_ends_it_and_is_not_shown(stream):
    output = feed(make_sequence(stop_token_ids=[ord("x")], stream=stream), "abxc")
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", ord("x"))
    assert output.token_ids == list(b"abx")


def test_the_text_ends_before_the_first_stop_string():
    output = feed(make_sequence(stop=["END", "\n\n"]), "one\ntwoEND\n\n")
    assert (output.text, output.finish_reason, output.stop_reason) == ("one\ntwo", "stop", "END")
    assert output.token_ids == list(b"one\ntwoEND")


def test_a_stop_string_wins_over_the_last_token():
    output = feed(make_sequence(stop="cd", max_tokens=4), "abcd")
    assert (output.text, output.finish_reason) == ("ab", "stop")


def test_a_stop_string_counts_only_from_min_tokens_on():
    output = feed(make_sequence(stop="b", min_tokens=4), "abcdbe")
    assert output.text == "abcd"


def test_what_may_begin_a_stop_string_is_held_back_while_streaming():
    sequence = make_sequence(stop="<end>", stream=True)
    shown = []
    for token in b"a <en b <end>":
        sequence.append(token)
        shown.append(sequence.output().text)
    assert not any("<end" in text for text in shown)
    assert shown[-1] == "a <en b "
    assert all(shown[-1].startswith(text) for text in shown)


def test_half_a_character_waits_for_its_rest_and_shows_at_the_end():
    sequence = make_sequence(stream=True)
    first, second = "é".encode()
    sequence.append(ord("a"))
    sequence.append(first)
    assert sequence.output().text == "a"
    sequence.append(second)
    assert sequence.output().text == "aé"
    sequence.append(first)
    sequence.finish("length")
    assert sequence.output().text == "aé\ufffd"


def test_text_made_at_once_and_token_by_token_agree():
    text = "naïve 日本語 🎉 done"
    plain, streamed = (feed(make_sequence(stream=s), text, EOS).text for s in (False, True))
    assert plain == streamed == text


def test_a_finished_request_reports_all_its_samples():
    sequence = make_sequence()
    assert not sequence.request.is_finished
    assert not sequence.request.output().outputs[0].finished()
    feed(sequence, "abc", EOS)
    report = sequence.request.output()
    assert report.finished
    assert (report.request_id, report.prompt, report.prompt_token_ids) == ("r", "prompt", [1])
    assert report.outputs[0].finished()


def test_logprobs_name_ranks_and_texts():
    sequence = make_sequence(logprobs=2)
    sequence.append_logprobs(ord("c"), -3.0, [(ord("a"), -0.5), (ord("b"), -1.0)])
    sequence.append(ord("c"))
    sequence.append_logprobs(ord("a"), -0.25, [(ord("a"), -0.25), (ord("b"), -2.0)])
    sequence.append(ord("a"))
    output = sequence.output()
    assert output.cumulative_logprob == -3.25
    assert output.logprobs[0][ord("c")] == (-3.0, None, "c")
    assert output.logprobs[0][ord("a")] == (-0.5, 1, "a")
    assert set(output.logprobs[1]) == {ord("a"), ord("b")}
