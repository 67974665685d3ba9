"""Scheduler and slots: who runs when, and that every row keeps its own keys and values.

The engine, runner, cache and slots are the real ones. The model is replaced by one whose next token
is a checksum of all that it can see, so that a single wrong, stale or missing cache entry shows.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from inferkit.engine.detokenize import Detokenizer
from inferkit.engine.engine import Engine
from inferkit.engine.request import Request
from inferkit.engine.runner import SlottedRunner
from inferkit.engine.scheduler import POLICIES, Entry, Scheduler, check_batching
from inferkit.engine.slots import common_prefix
from inferkit.errors import NonFiniteLogitsError, OptionError
from inferkit.generation import Generation, Settings
from inferkit.kv import LayerKV
from inferkit.sampling import SamplingParams

VOCABULARY = 997
WINDOW = 8
LAYERS = (
    LayerKV("sliding", 1, 1, 1, window=WINDOW),
    LayerKV("full", 1, 1, 1),
    LayerKV("chunked", 1, 1, 1, window=WINDOW),
)
SETTINGS = Settings(
    model="telltale",
    device="cpu",
    dtype="float32",
    quantization="none",
    batching="continuous",
    max_batch=1,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More only wait for each other where tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weigh(value, position):
    """A term of a checksum; the same for numbers and tensors."""
    return (value + 1) * (31 * position * position + 7 * position + 1)


def first_seen(layer: LayerKV, position: int) -> int:
    if layer.kind == "sliding":
        return max(0, position - WINDOW + 1)
    return position // WINDOW * WINDOW if layer.kind == "chunked" else 0


def continued(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """What the model says after a prompt, worked out without a cache."""
    tokens: list[int] = list(prompt)
    rows: list[list[int]] = [[] for _ in LAYERS]
    while True:
        value = tokens[len(rows[0])]
        for row, layer in zip(rows, LAYERS, strict=True):
            row.append(value)
            last = len(row) - 1
            seen = range(first_seen(layer, last), last + 1)
            value = sum(weigh(row[i], i) for i in seen) % VOCABULARY
        if len(rows[0]) == len(tokens):
            if len(tokens) == len(prompt) + count:
                return tuple(tokens[len(prompt) :])
            tokens.append(value)


class Telltale(torch.nn.Module):
    """Each layer caches what the last one gave, with its position, and adds up what it may see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.ones(1))
        self.embedding = torch.nn.Embedding(VOCABULARY, 1)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def set_attn_implementation(self, name: str) -> None:
        assert name == "inferkit"

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, **_):
        value = input_ids
        for index, layer in enumerate(LAYERS):
            new = (value[:, None, :, None].float(), position_ids[:, None, :, None].float())
            keys, values = past_key_values.update(*new, index)
            seen = attention_mask[f"{layer.kind}_attention"][:, 0] == 0
            terms = weigh(keys[:, 0, :, 0].long(), values[:, 0, :, 0].long())
            value = (terms[:, None] * seen).sum(dim=-1) % VOCABULARY
        logits = torch.nn.functional.one_hot(value[:, -1:], VOCABULARY)
        return SimpleNamespace(logits=logits.float())


class Gate:
    """Holds the engine before its passes, so that a test decides what arrives when."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed: int | None = None
        self._held = False

    def enter(self) -> None:
        """The engine comes to a pass."""
        with self._changed:
            if self._allowed is not None:
                self._held = self._allowed == 0
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._allowed != 0, 60)
                self._held = False
                self._allowed = None if self._allowed is None else self._allowed - 1

    def open(self) -> None:
        with self._changed:
            self._allowed = None
            self._changed.notify_all()

    def allow(self, passes: int) -> None:
        """Let so many passes begin; return when the engine stands before the next."""
        with self._changed:
            self._allowed, self._held = passes, self._held and passes == 0
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._held and self._allowed == 0, 60)

    def close(self) -> None:
        with self._changed:
            self._allowed = 0


class Served:
    """An engine on a Telltale, with a gate before each pass."""

    def __init__(self, *, batching="continuous", max_batch=4, context=128, chunk=8, reuse=True):
        runner = SlottedRunner(
            Telltale(), LAYERS, slots=max_batch, context=context, prefill_chunk=chunk
        )
        self.gate = Gate()
        runner.prefill = self._gated(runner.prefill)  # type: ignore[method-assign]
        runner.decode = self._gated(runner.decode)  # type: ignore[method-assign]
        self.engine = Engine(
            runner,
            end_ids=frozenset(),
            context=context,
            batching=batching,
            max_batch=max_batch,
            prefix_reuse=reuse,
            settings=lambda: SETTINGS,
            name="telltale",
        )

    def _gated(self, work: Callable) -> Callable:
        def run(*args):
            self.gate.enter()
            return work(*args)

        return run

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The engine stands still before the first pass of what is submitted within, or runs."""
        self.gate.close()
        yield
        self.gate.allow(0)
        self.gate.open()

    def request(self, prompt: list[int], max_tokens: int = 8) -> Request:
        return Request(
            None,
            tuple(prompt),
            SamplingParams(max_tokens=max_tokens),
            SETTINGS,
            Detokenizer(None, prompt, ()),
            self.engine.wake,
        )

    def submit(self, *prompts: list[int], max_tokens: int = 8) -> list[Request]:
        requests = [self.request(p, max_tokens) for p in prompts]
        self.engine.submit(requests)
        return requests


@contextmanager
def serving(**options) -> Iterator[Served]:
    served = Served(**options)
    try:
        yield served
    finally:
        served.gate.open()
        served.engine.close()


def results(requests: list[Request]) -> list[Generation]:
    done = [r.result(60) for r in requests]
    for gen in done:
        assert gen.error is None
        expected = continued(gen.prompt_token_ids, len(gen.token_ids))
        assert gen.token_ids == expected, (gen.prompt_token_ids, gen.finish_reason)
    return done


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def draw(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(VOCABULARY) for _ in range(length)]


PROMPTS = [draw(random.Random(i), length) for i, length in enumerate((30, 1, 17, 64, 8, 9, 5, 23))]


def span(gen: Generation) -> tuple[int, int]:
    trace = gen.latency.trace
    assert trace.scheduled is not None
    assert trace.finished is not None
    return trace.scheduled, trace.finished


def overlap(a: Generation, b: Generation) -> bool:
    return span(a)[0] < span(b)[1] and span(b)[0] < span(a)[1]


# -- policies ---------------------------------------------------------------------------------


def test_continuous_admits_a_request_while_others_run():
    with serving(batching="continuous", max_batch=2) as served:
        with served.paused():
            first = served.submit(PROMPTS[0], max_tokens=20)
        wait_until(lambda: len(first[0].token_ids) > 0)
        with served.paused():
            second = served.submit(PROMPTS[1], max_tokens=3)
        a, b = results(first + second)
    assert span(a)[0] < span(b)[0] < span(b)[1] < span(a)[1]


def test_continuous_gives_the_slot_of_an_ended_request_to_the_next():
    with serving(batching="continuous", max_batch=2) as served:
        long, *short = results(
            served.submit(PROMPTS[1], max_tokens=60) + served.submit(*PROMPTS[4:8], max_tokens=3)
        )
        assert max(step.running for step in served.engine.steps) == 2
    assert sum(overlap(long, gen) for gen in short) >= 3
    assert all(not overlap(a, b) for a, b in itertools.pairwise(short))


def test_static_starts_the_next_batch_when_all_of_the_last_has_ended():
    with serving(batching="static", max_batch=3) as served:
        requests = [served.request(p, 2 + 4 * i) for i, p in enumerate(PROMPTS)]
        served.engine.submit(requests)
        done = results(requests)
    batches = [done[:3], done[3:6], done[6:]]
    for batch in batches:
        assert all(overlap(a, b) for a in batch for b in batch)
    for earlier, later in itertools.pairwise(batches):
        assert max(span(g)[1] for g in earlier) < min(span(g)[0] for g in later)


def test_static_decodes_once_all_prompts_of_the_batch_are_prefilled():
    with serving(batching="static", max_batch=3, chunk=8, reuse=False) as served:
        done = results(served.submit(*PROMPTS[:4], max_tokens=4))
        steps = list(served.engine.steps)
    batch = done[:3]
    last_first_token = max(g.latency.trace.tokens[0] for g in batch)
    assert all(g.latency.trace.tokens[1] > last_first_token for g in batch)
    assert not any(s.prefill_tokens and s.decode_tokens for s in steps)


def test_off_runs_one_request_at_a_time_in_order():
    with serving(batching="off", max_batch=4) as served:
        done = results(served.submit(*PROMPTS))
        assert max(step.decode_tokens for step in served.engine.steps) == 1
    for earlier, later in itertools.pairwise(done):
        assert span(earlier)[1] < span(later)[0]


def test_a_policy_switched_while_requests_wait_holds_for_those():
    with serving(batching="off", max_batch=4) as served:
        with served.paused():
            requests = served.submit(*PROMPTS, max_tokens=12)
            served.gate.allow(0)
            served.engine.set_batching("continuous")
        done = results(requests)
        assert max(step.running for step in served.engine.steps) == 4
    assert overlap(done[0], done[3])


def test_switching_to_off_lets_what_runs_finish_and_then_runs_one_by_one():
    with serving(batching="continuous", max_batch=4) as served:
        with served.paused():
            requests = served.submit(*PROMPTS, max_tokens=12)
            served.gate.allow(0)
            served.engine.set_batching("off")
        done = results(requests)
    assert all(overlap(a, b) for a in done[:4] for b in done[:4])
    for earlier, later in itertools.pairwise(done[4:]):
        assert span(earlier)[1] < span(later)[0]


@pytest.mark.parametrize(
    ("batching", "max_batch", "named"),
    [
        ("dynamic", 4, "continuous, static, off"),
        ("static", 0, "max_batch=0"),
        ("static", 2.0, "max_batch=2.0"),
        ("off", True, "max_batch=True"),
    ],
)
def test_an_unknown_policy_or_batch_is_refused(batching, max_batch, named):
    with pytest.raises(OptionError, match=named):
        check_batching(batching, max_batch)


# -- prefill ----------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_running_rows():
    with serving(max_batch=2, chunk=8, context=256) as served:
        with served.paused():
            short = served.submit(PROMPTS[1], max_tokens=100)
        wait_until(lambda: len(short[0].token_ids) > 0)
        with served.paused():
            long = served.submit(draw(random.Random(9), 150), max_tokens=2)
        results(short + long)
        steps = list(served.engine.steps)
    mixed = [s for s in steps if s.prefill_tokens and s.running == 2]
    assert len(mixed) == 19  # 150 tokens in parts of 8
    assert all(s.decode_tokens >= 1 for s in mixed)


def entries(*lengths: int) -> list[Entry]:
    served = SimpleNamespace(engine=SimpleNamespace(wake=None))
    return [Entry(Served.request(served, [1] * n)) for n in lengths]  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [(3, 3, 3), (20, 1, 1), (1, 8, 2), (5, 4, 1, 1, 1), (1,) * 12])
def test_a_step_prefills_no_more_than_a_chunk_padding_included(lengths):
    scheduler = Scheduler("continuous", 16, prefill_chunk=8)
    ready = entries(*lengths)
    parts = scheduler.step(ready).prefill
    assert parts[0] == (ready[0], min(8, lengths[0]))  # the oldest always goes on
    assert max(n for _, n in parts) * len(parts) <= 8
    left_out = [e for e in ready if e not in [e for e, _ in parts]]
    width = max(n for _, n in parts)
    for entry in left_out:  # none of these would still have fitted
        assert max(width, min(8, entry.remaining)) * (len(parts) + 1) > 8


def test_admission_is_first_come_first_served():
    scheduler = Scheduler("continuous", 2, prefill_chunk=8)
    waiting = entries(1, 2, 3, 4)
    for entry in waiting:
        scheduler.add(entry)
    assert scheduler.admit() == waiting[:2]
    assert scheduler.admit() == []
    scheduler.remove(waiting[1])
    scheduler.remove(waiting[2])  # cancelled while it waited
    assert scheduler.admit() == waiting[3:]


# -- prefix reuse -----------------------------------------------------------------------------


def cached(gen: Generation) -> int:
    return gen.latency.trace.cached_tokens


def test_the_next_turn_of_a_chat_prefills_only_what_is_new():
    with serving(context=256) as served:
        (first,) = results(served.submit(PROMPTS[3], max_tokens=10))
        turn = [*first.prompt_token_ids, *first.token_ids, *PROMPTS[4]]
        (second,) = results(served.submit(turn))
    # The last token of an answer is never fed back, so it is not in the cache.
    assert cached(second) == len(first.prompt_token_ids) + len(first.token_ids) - 1


def test_a_prefix_is_taken_from_a_request_that_still_runs():
    with serving() as served:
        with served.paused():
            donor = served.submit(PROMPTS[3] + PROMPTS[4], max_tokens=30)
        wait_until(lambda: len(donor[0].token_ids) > 1)
        with served.paused():
            heir = served.submit(PROMPTS[3] + PROMPTS[5])
        a, b = results(donor + heir)
    assert overlap(a, b)
    # In the window layers, what the donor has written since has not yet replaced the prefix.
    assert cached(b) == len(PROMPTS[3])


def test_requests_that_arrive_together_compute_their_common_prefix_once():
    with serving() as served:
        shared = PROMPTS[3]
        done = results(served.submit([*shared, 1], [*shared, 2], [*shared, 3]))
    assert cached(done[0]) == 0
    # They wait for it until fewer than 16 tokens of it are still to come.
    assert all(len(shared) - 16 < cached(g) <= len(shared) for g in done[1:])


def test_a_prefix_is_not_reused_where_a_ring_has_lost_its_window():
    with serving(context=256, chunk=8) as served:  # the rings hold 64 positions
        (donor,) = results(served.submit(PROMPTS[3], max_tokens=60))
        early, late = results(
            served.submit(
                PROMPTS[3][:40] + PROMPTS[4],
                [*PROMPTS[3], *donor.token_ids[:50], *PROMPTS[4]],
                max_tokens=20,
            )
        )
    assert cached(early) == 0
    assert cached(late) == len(PROMPTS[3]) + 50


@pytest.mark.parametrize("length", range(44, 50))
def test_a_prefix_at_the_edge_of_what_a_ring_still_holds(length):
    with serving(context=256, chunk=8) as served:
        results(served.submit(PROMPTS[3], max_tokens=40))
        (heir,) = results(served.submit(PROMPTS[3][:length] + PROMPTS[4]))
    # 103 positions were written and 64 are held; the 7 before the next one are needed.
    assert cached(heir) == (length if length - 7 > 103 - 64 else 0)


@pytest.mark.parametrize("length", [70, 90, 110, 125, 140])
def test_padding_counts_among_what_replaces_entries_of_a_ring(length):
    donor = draw(random.Random(1), 193)  # three chunks of 64, and one token that is padded to 32
    with serving(context=256, chunk=64) as served:
        results(served.submit(donor, draw(random.Random(2), 32), max_tokens=1))
        results(served.submit(donor[:length] + PROMPTS[4]))


def test_a_kept_prefix_survives_the_decode_passes_that_its_new_owner_waits_through():
    """A request can wait for another's prefix in a slot below one that decodes."""
    shared = PROMPTS[3][:47]  # the shortest that the rings of the kept slots still hold
    with serving(context=256, chunk=2, max_batch=5) as served:
        results(served.submit(PROMPTS[3], PROMPTS[3], max_tokens=40))  # two slots keep the prefix
        served.gate.close()
        first, second, third = served.submit([1], [2], [3], max_tokens=60)
        served.gate.allow(8)
        ahead = served.submit(shared + draw(random.Random(1), 60))
        served.gate.allow(2)
        first.cancel()  # whose slot goes to the one ahead
        waits = served.submit([*ahead[0].prompt_token_ids[:80], 5])
        served.gate.allow(2)
        second.cancel()  # whose slot goes to the one that waits
        served.gate.allow(2)
        ahead[0].cancel()
        served.gate.open()
        results([first, second, third, *ahead])
        assert cached(*results(waits)) == len(shared)


def test_a_short_common_prefix_is_not_worth_a_copy():
    with serving() as served:
        with served.paused():
            running = served.submit(PROMPTS[0], max_tokens=30)
        wait_until(lambda: len(running[0].token_ids) > 0)
        with served.paused():
            other = served.submit(PROMPTS[0][:15] + PROMPTS[4])
        results(running)
        assert cached(*results(other)) == 0


def test_nothing_is_reused_when_reuse_is_off():
    with serving(reuse=False) as served:
        for _ in range(2):
            assert [cached(g) for g in results(served.submit(*PROMPTS))] == [0] * len(PROMPTS)


def test_the_same_prompt_again_still_computes_its_last_token():
    with serving() as served:
        results(served.submit(PROMPTS[0]))
        assert cached(*results(served.submit(PROMPTS[0]))) == len(PROMPTS[0]) - 1


def test_the_cache_of_a_cancelled_request_is_reused():
    with serving() as served:
        with served.paused():
            stopped = served.submit(PROMPTS[0], max_tokens=90)
        wait_until(lambda: len(stopped[0].token_ids) > 2)
        stopped[0].cancel()
        (gen,) = results(stopped)
        assert gen.finish_reason == "cancelled"
        turn = [*PROMPTS[0], *gen.token_ids, *PROMPTS[4]]
        assert cached(*results(served.submit(turn))) == len(turn) - len(PROMPTS[4]) - 1


def test_common_prefix_of_lists_of_any_length():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == common_prefix([1], [2]) == 0


# -- all together -----------------------------------------------------------------------------


def test_a_prompt_may_fill_the_context_but_for_one_token():
    with serving(context=64, chunk=8, max_batch=3) as served:
        done = results(served.submit(*(draw(random.Random(n), n) for n in (63, 61, 2, 63, 58))))
    assert [len(g.token_ids) for g in done] == [1, 3, 8, 1, 6]
    assert all(g.finish_reason == "length" for g in done)


def test_padding_stays_within_the_context():
    with serving(context=63, chunk=64) as served:  # the cache has not one position more
        (first,) = results(served.submit(draw(random.Random(1), 50), max_tokens=1))
        beside = draw(random.Random(2), 30)  # the other part is padded to as many tokens
        a, _ = results(served.submit([*first.prompt_token_ids, 1, 2, 3, 4], beside))
    assert cached(a) == 50


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_arrivals_lengths_prefixes_policies_and_cancellations(seed):
    """Random traffic over a random engine: every token of every request is the right one."""
    dice = random.Random(seed)
    # 63 and 127: nothing is left beyond the context; 64: a chunk as long as a small ring.
    context = (24, 63, 100, 127, 200)[seed % 5]
    pool = [draw(dice, context) for _ in range(3)]
    with serving(
        batching=dice.choice(POLICIES),
        max_batch=dice.randint(1, 6),
        context=context,
        chunk=(8, 64, 1, 20)[seed % 4],
        reuse=dice.random() < 0.8,
    ) as served:
        requests: list[Request] = []
        for _ in range(40):
            prompt = dice.choice(pool)[: dice.randint(0, context - 1)]
            if dice.random() < 0.3 and requests and requests[-1].done:
                last = requests[-1]
                prompt = [*last.prompt_token_ids, *last.token_ids]
            prompt = (prompt + draw(dice, dice.randint(1, 12)))[: context - 1]
            requests += served.submit(prompt, max_tokens=dice.randint(1, 40))
            if dice.random() < 0.2:
                dice.choice(requests).cancel()
            if dice.random() < 0.1:
                served.engine.set_batching(dice.choice(POLICIES))
            if dice.random() < 0.5:
                time.sleep(dice.random() * 0.01)
        done = results(requests)
        assert served.engine.running == served.engine.waiting == 0
    for request, gen in zip(requests, done, strict=True):
        room = min(request.params.max_tokens, context - len(gen.prompt_token_ids))
        assert len(gen.token_ids) == room or gen.finish_reason == "cancelled"
    assert sum(g.finish_reason == "length" for g in done) > 20


def test_a_hundred_requests_from_ten_threads_are_all_served():
    with serving(max_batch=4) as served:
        found: list[Generation] = []

        def ask(seed: int) -> None:
            for n in range(10):
                prompt = draw(random.Random(seed * 10 + n), n + 1)
                found.append(served.submit(prompt)[0].result(60))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 100
    for gen in found:
        assert gen.token_ids == continued(gen.prompt_token_ids, 8)


def test_a_failed_request_leaves_nothing_in_its_slot():
    """NaN times a mask's zero is NaN: one left behind would spoil the slot's next request."""
    with serving(max_batch=2) as served:
        runner = served.engine.runner
        decode = runner.decode

        def spoiled(tokens, positions):
            logits = decode(tokens, positions).clone()
            slot = tokens.index(bad.token_ids[-1])
            runner.cache._layers[1].values[slot].fill_(torch.nan)
            logits[slot] = torch.nan
            runner.decode = decode
            return logits

        with served.paused():
            bad, good = served.submit(PROMPTS[0], PROMPTS[2])
            runner.decode = spoiled
        assert isinstance(bad.result(60).error, NonFiniteLogitsError)
        results([good])
        for layer in runner.cache._layers:
            assert layer.keys.isfinite().all()
            assert layer.values.isfinite().all()
        results(served.submit(PROMPTS[0], PROMPTS[1]))
