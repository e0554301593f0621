"""Properties of a comparison of two agents: fairness of the test, one word for many metrics, and what may not be compared."""
import asyncio
import pytest
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from stateset_nb.agents import Agent, AgentConfig, Reply
from stateset_nb.comparison import (ABTestConfig, ABTestResult, compare_metrics, compare_results, compare_rivals, determine_winner, generate_recommendation,
                                    overall_verdict, run_ab_test)
from stateset_nb.core import ConfigError, DataError, Message, Scenario
from stateset_nb.environments import ConversationEnvironment, Step
from stateset_nb.evaluation import TestResult, TestResults, evaluate

class Coin(ConversationEnvironment):
    "Success when the agent says heads."
    async def outcome(self):
        won = self.talk[-1].text == 'heads'
        return Step(terminated=True, reward=float(won), info={'success': won})

class Tosser:
    "Says heads in so many of ten cases, and writes down when it was asked."
    def __init__(self, skill, diary=None, breaks=0): self.skill, self.diary, self.breaks = skill, diary, breaks
    async def reply(self, messages, tools, params):
        if self.diary is not None: self.diary.append((self.skill, messages[0].text))
        if self.breaks and params.seed % self.breaks == 0: raise TimeoutError('no answer')
        return Reply(Message('assistant', 'heads' if params.seed % 10 < self.skill else 'tails'))

def agent(*a, **kw): return Agent(AgentConfig('stub'), Tosser(*a, **kw))
SCENARIOS = [Scenario(f'toss-{i}', (Message('user', f'Toss {i}!'),)) for i in range(40)]
def config(a, b, **kw): return ABTestConfig(a, b, SCENARIOS, Coin(), **{'trials': 2} | kw)
def ab(a, b, **kw): return asyncio.run(run_ab_test(config(a, b, **kw)))

def test_agents_take_turns_and_who_is_first_alternates():
    diary = []
    ab(agent(3, diary), agent(6, diary), block=10, trials=1)
    order = [skill for skill, _ in diary][::10]
    assert order == [3, 6, 6, 3, 3, 6, 6, 3]
    assert sorted(t for s, t in diary if s == 3) == sorted(t for s, t in diary if s == 6)

@pytest.mark.parametrize('block', [1, 7, 1000])
def test_the_order_of_play_changes_nothing(block):
    r = ab(agent(3), agent(6), block=block)
    assert r.a == asyncio.run(evaluate(agent(3), Coin(), SCENARIOS, trials=2, name='A'))
    assert r == ab(agent(3), agent(6))

def test_an_agent_against_itself_differs_in_nothing():
    r = ab(agent(5), agent(5), metrics={'success': .05, 'reward': .05})
    assert [c.difference for c in r.table.comparisons] == [0, 0]
    assert r.verdict == 'not_worse' and determine_winner(r) is None and r.exit_code == 0

def test_a_clear_winner_wins_from_either_side():
    up, down = ab(agent(2), agent(8)), ab(agent(8), agent(2))
    assert (up.verdict, determine_winner(up), up.exit_code) == ('better', 'B', 0)
    assert (down.verdict, determine_winner(down), down.exit_code) == ('worse', 'A', 1)
    assert generate_recommendation(up).startswith('Take B.') and generate_recommendation(down).startswith('Keep A rather than B.')

def test_an_agent_that_breaks_loses_success_and_the_rest_is_paired_where_both_have_values():
    r = ab(agent(5), agent(5, breaks=3), trials=1, metrics={'success': .05, 'reward': .05})
    success, reward = r.table.comparisons
    assert r.b.errors and success.n == 40 and reward.n == 40 - sum(r.b.errors.values())
    assert success.after < success.before
    assert 'failed in' in r._repr_html_()

def test_agents_may_be_given_as_configs():
    r = ab(AgentConfig('stub', responses=('tails',)), AgentConfig('stub', responses=('heads',)))
    assert (r.a.success.value, r.b.success.value, r.verdict) == (0, 1, 'better')

def fake(values, agent='x', scenario_set='s'):
    "A test with one trial a scenario: (success, speed) of each."
    return TestResults(tuple(TestResult(f's{i}', 0, ok, {'speed': v}) for i, (ok, v) in enumerate(values)), agent, scenario_set=scenario_set)

numbers = st.tuples(st.booleans(), st.integers(1, 5).map(float))
pairs = st.integers(2, 25).flatmap(lambda n: st.tuples(*[st.lists(numbers, min_size=n, max_size=n)] * 2))

@settings(max_examples=60)
@given(pairs, st.sampled_from([.01, .1, .5]))
def test_one_word_never_passes_what_a_metric_does_not(ab, margin):
    a, b = fake(ab[0], 'A'), fake(ab[1], 'B')
    t = compare_metrics(a, b, {'success': margin, 'speed': margin})
    word = overall_verdict(t.comparisons)
    r = ABTestResult(a, b, t)
    if word in ('better', 'not_worse'): assert all(c.within_margin for c in t.comparisons)
    if word == 'better': assert any(c.verdict == 'better' for c in t.comparisons) and determine_winner(r) == 'B'
    if word in ('not_worse', 'inconclusive'): assert determine_winner(r) is None
    assert r.exit_code == {'better': 0, 'not_worse': 0, 'worse': 1, 'inconclusive': 2}[word]
    assert all(c.sentence() in generate_recommendation(r) for c in t.comparisons)
    assert ABTestResult.from_dict(r.to_dict()) == r

@settings(max_examples=60)
@given(pairs)
def test_rivals_are_corrected_together(ab):
    base, rival = fake(ab[0], 'base'), fake(ab[1], 'rival')
    alone = compare_rivals(base, [rival]).comparisons[0]
    assert alone == compare_results(base, rival)
    many = compare_rivals(base, [rival] * 5).comparisons[0]
    assert many.p_value >= alone.p_value and (many.verdict == alone.verdict or alone.verdict in ('better', 'worse'))

def test_what_may_not_be_compared_is_refused():
    a = fake([(True, 1.), (False, 2.), (True, 1.)])
    with pytest.raises(DataError, match='different scenarios'): compare_results(a, replace(a, scenario_set='other'))
    with pytest.raises(ConfigError, match='for training only'): compare_results(a, replace(a, training_only=('speed',)), 'speed')
    with pytest.raises(DataError, match="no trial has 'charm'"): compare_results(a, a, 'charm')
    with pytest.raises(DataError, match='no rivals'): compare_rivals(a, [])
    with pytest.raises(ConfigError, match='at least one'): compare_metrics(a, a, {})

@pytest.mark.parametrize('kw', [{'block': 0}, {'trials': 0}, {'metrics': {}}, {'metrics': {'success': -1}}, {'name_a': 'B'}])
def test_bad_plans_are_refused(kw):
    with pytest.raises(ConfigError): config(agent(1), agent(2), **kw)

def test_lower_is_better_where_the_metric_says_so():
    a = TestResults(tuple(TestResult(f's{i}', 0, True, {'turns': 8. + i % 2}) for i in range(20)), 'A')
    b = TestResults(tuple(TestResult(f's{i}', 0, True, {'turns': 4. + i % 3}) for i in range(20)), 'B')
    assert compare_results(a, b, 'turns').verdict == 'better'
    assert compare_results(a, b, 'turns', higher_is_better=True).verdict == 'worse'

def test_plots_carry_units_and_names_are_escaped():
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    r = ab(agent(2), agent(8), name_b='<script>')
    assert '<script>' not in r._repr_html_() and '<script>' not in compare_rivals(r.a, [r.b])._repr_html_()
    ax = r.plot()
    assert 'points' in ax.get_xlabel() and 'better' in ax.get_title()
    assert list(r.table.to_frame().columns) == ['label', 'metric', 'verdict', 'before', 'after', 'difference', 'low', 'high', 'n']
    plt.close('all')
