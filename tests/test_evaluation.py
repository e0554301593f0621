"""Properties of a test of an agent: slices, files, repeatability, and what failure counts as."""
import asyncio
import pytest
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from stateset_nb.agents import Agent, AgentConfig, Reply
from stateset_nb.core import DataError, Message, Scenario, StateSetError
from stateset_nb.environments import ConversationEnvironment, Step
from stateset_nb.evaluation import TestResult, TestResults, TrainingMetrics, evaluate
from stateset_nb.rewards import reward_function

class Coin(ConversationEnvironment):
    "Success when the agent says heads."
    async def outcome(self):
        won = self.talk[-1].text == 'heads'
        return Step(terminated=True, reward=float(won), info={'success': won, 'requests': [{'kind': 'toss', 'success': won}]})

class Tosser:
    "Says heads or tails by the seed, and breaks now and then."
    def __init__(self, breaks=0): self.breaks = breaks
    async def reply(self, messages, tools, params):
        await asyncio.sleep(0)
        if self.breaks and params.seed % self.breaks == 0: raise TimeoutError('no answer')
        return Reply(Message('assistant', 'heads' if params.seed % 3 else 'tails'))

def tosses(n): return [Scenario(f'toss-{i}', (Message('user', 'Toss!'),), difficulty=1 + i % 3, tags=('coin', f'side-{i % 2}')) for i in range(n)]
def run(breaks=0, n=12, reward=None, **kw): return asyncio.run(evaluate(Agent(AgentConfig('stub'), Tosser(breaks)), Coin(), tosses(n), reward, **kw))

@st.composite
def some_results(draw):
    k, n = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    one = st.tuples(st.booleans(), st.sampled_from([None, None, None, 'TimeoutError: no answer']))
    rows = [TestResult(f's{i}', j, ok and not err, {} if err else {'reward': float(ok)}, err, 1 + i % 3, (f't{i % 2}',), () if err else ({'kind': 'a', 'success': ok},))
            for i in range(n) for j in range(k) for ok, err in [draw(one)]]
    return TestResults(tuple(rows), 'agent', 0, k)

@given(some_results())
def test_slices_are_the_whole(t):
    whole = sum(t.outcomes().values(), [])
    assert len(whole) == len(t.results)
    s = t.by('difficulty')
    assert sum(i.n for i in s.values()) == t.success.n
    assert sum(i.value * i.n for i in s.values()) == pytest.approx(t.success.value * t.success.n)
    assert all(0 <= i.low <= i.value <= i.high <= 1 for key in ('difficulty', 'tag', 'kind') for i in t.by(key).values())
    assert sum(t.errors.values()) == sum(r.error is not None for r in t.results)
    assert ('(episode failed)' in t.by('kind')) == bool(t.errors)

@given(some_results())
def test_four_in_a_row_is_never_likelier_than_three(t):
    v = [t.pass_hat(k).value for k in range(1, t.trials + 1)]
    assert v == sorted(v, reverse=True) and v[0] == pytest.approx(t.success.value)
    with pytest.raises(DataError): t.pass_hat(t.trials + 1)

@settings(max_examples=25)
@given(some_results())
def test_what_is_saved_comes_back(tmp_path_factory, t):
    f = t.save(tmp_path_factory.mktemp('t') / 'x.jsonl')
    assert TestResults.load(f) == t
    assert len(t.to_frame()) == len(t.results)
    m = TrainingMetrics.from_results(t)
    assert TrainingMetrics.from_dict(m.to_dict()) == m

def test_the_same_seed_gives_the_same_test_however_many_play_at_once():
    one, many = run(trials=3, limit=1), run(trials=3, limit=64)
    assert one == many and one != run(trials=3, seed=1)
    assert 0 < one.success.value < 1

def test_a_scenario_has_the_same_luck_in_every_test_it_is_part_of():
    few, all_of_them = run(n=3, trials=2), run(n=12, trials=2)
    assert few.outcomes() == {k: v for k, v in all_of_them.outcomes().items() if k in few.outcomes()}
    assert few.scenario_set != all_of_them.scenario_set

def test_a_broken_episode_is_a_failure_and_keeps_its_name():
    t = run(breaks=4, trials=3)
    broken = [r for r in t.results if r.error]
    assert broken and not any(r.success for r in broken) and all('TimeoutError: no answer' == r.error for r in broken)
    assert len(t.results) == 36
    with pytest.raises(StateSetError, match='every one'): run(breaks=1)

def test_a_reward_that_fails_does_not_change_success():
    @reward_function
    def fails(turns):
        if turns[-1].text == 'heads': raise TimeoutError('the judge is away')
        return 0.
    plain, judged = run(trials=2), run(trials=2, reward=fails)
    assert judged.success == plain.success and judged.errors
    assert all('reward' not in r.metrics for r in judged.results if r.error)

def test_a_reward_for_training_only_is_marked():
    assert run(reward=reward_function(lambda turns: 1., name='hint', for_verdict=False)).training_only == ('reward', 'hint')
    assert run(reward=reward_function(lambda turns: 1., name='fact')).training_only == ()

def test_success_may_be_a_function_of_the_trajectory():
    t = run(success=lambda t: t.messages[-1].text == 'tails')
    assert t.success.value == pytest.approx(1 - run().success.value)

def test_an_empty_or_foreign_file_is_named(tmp_path):
    f = tmp_path / 'x.jsonl'
    f.write_text('')
    with pytest.raises(DataError, match='the file is empty'): TestResults.load(f)
    f.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match='line 1: TestResults has the unknown key'): TestResults.load(f)

def test_names_are_escaped_and_small_tests_can_be_drawn():
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    t = replace(run(breaks=4), agent='<script>x</script>')
    assert '<script>' not in t._repr_html_()
    assert 'success' in t.plot().get_xlabel() and 'success' in t.plot(by='kind').get_xlabel()
    plt.close('all')
