"""What must hold in every iteration, whatever comes in: against a recount that keeps every sequence by itself."""

from core.toy import spec
from hypothesis import given
from hypothesis import strategies as st

from throttllem.engines.simulated.batcher import Batcher


class Recount:
    """Each request by itself: prompt (with what was thrown away), start, tokens given, prompt tokens processed."""

    def __init__(self, spec):
        self.spec = spec
        self.sequences = {}
        self.holding = {}
        self.running = {}
        self.started, self.ended = [], []

    def add(self, key, prompt, answer):
        self.sequences[key] = [prompt, answer, 0, 0]

    def begin(self, iteration):
        k = iteration.index
        for key in iteration.preempted:
            sequence = self.sequences[key]
            order = list(self.holding)
            assert order[-1] == key, "the last to come in is the first to go"
            del self.holding[key]
            if (start := self.running.pop(key, None)) is not None:
                sequence[0] += k - start
            sequence[3] = 0
        for key, tokens in iteration.prefills:
            self.holding.setdefault(key, None)
            self.sequences[key][3] += tokens
            assert key not in self.running and self.sequences[key][3] <= self.sequences[key][0]
        tokens = {key: self.sequences[key][0] + k - self.running.get(key, k) for key in self.holding}
        assert iteration.kv_blocks == sum(-(-held // self.spec.block_tokens) for held in tokens.values())
        assert iteration.kv_blocks <= self.spec.kv_blocks
        assert iteration.kv_tokens == sum(tokens[key] for key in self.running)
        assert iteration.decode_sequences == len(self.running)
        assert iteration.prefill_tokens == sum(share for _, share in iteration.prefills)
        assert 1 <= iteration.batch <= len(self.holding) <= self.spec.max_batch
        self.budget(iteration)

    def budget(self, iteration):
        """Only decode sequences alone, or one whole prompt, may go over it."""
        over = iteration.decode_sequences + iteration.prefill_tokens > self.spec.prefill_budget_tokens
        assert not over or len(iteration.prefills) == (0 if self.spec.chunked else 1) or not iteration.prefills

    def end(self, outcome):
        for key in self.running:
            self.sequences[key][2] += 1
        for key in outcome.started:
            prompt, _, _, prefilled = self.sequences[key]
            assert prefilled == prompt
            self.running[key] = outcome.index
            self.sequences[key][2] += 1
            self.started.append(key)
        done = {key for key in self.running if self.sequences[key][2] == self.sequences[key][1]}
        assert set(outcome.finished) == done and len(outcome.finished) == len(done)
        for key in outcome.finished:
            del self.running[key], self.holding[key]
            self.ended.append(key)

    def cancel(self, key):
        self.running.pop(key, None)
        self.holding.pop(key, None)
        del self.sequences[key]


@st.composite
def engines(draw):
    block = draw(st.integers(1, 9))
    return spec(
        block_tokens=block,
        kv_blocks=-(-40 // block) + draw(st.integers(0, 12)),
        max_batch=draw(st.integers(1, 6)),
        prefill_budget_tokens=draw(st.integers(1, 40)),
        chunked=draw(st.booleans()),
        no_evict=draw(st.booleans()),
    )


arrivals = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 12), st.integers(0, 6), st.booleans()),
    min_size=1,
    max_size=16,
)
"""(prompt, answer, max_tokens beyond it, iterations before the next one, hangs up then?)"""


@given(engines(), arrivals)
def test_every_iteration_and_every_end(spec, arrivals):
    batcher, recount = Batcher(spec), Recount(spec)
    cancelled = set()

    def step():
        if (iteration := batcher.begin()) is None:
            return False
        recount.begin(iteration)
        outcome = batcher.end()
        recount.end(outcome)
        assert outcome.preempted == iteration.preempted
        return True

    for key, (prompt, answer, spare, pause, hangs_up) in enumerate(arrivals):
        limit = min(answer + spare, 40 - prompt)
        batcher.add(key, prompt_tokens=prompt, output_tokens=answer, max_tokens=limit)
        recount.add(key, prompt, answer)
        for _ in range(pause):
            step()
        if hangs_up and key not in recount.ended:
            batcher.cancel(key)
            recount.cancel(key)
            cancelled.add(key)
    # Each (re)start and each token takes an iteration at least; nothing may take for ever.
    assert any(not step() for _ in range(20_000))
    assert sorted(recount.ended + sorted(cancelled)) == list(range(len(arrivals)))
    assert (batcher.used_blocks, len(batcher)) == (0, 0)
    if spec.no_evict:
        assert batcher.preemptions == 0
    if not batcher.preemptions:
        assert recount.started == sorted(recount.started), "first come, first started"
