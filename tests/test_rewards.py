"""Rewards: numbers stay in range on any text, mixtures are means, and work grows no faster than the text."""
import asyncio, copy, gc, itertools, json, pickle, random, re, statistics, subprocess, sys
import pytest
from conftest import ROOT, lacking
from hypothesis import given, settings, strategies as st
from stateset_nb.core import ConfigError, Conversation, DataError, Message, Scenario, StateSetError, ToolCall, Trajectory, TrajectoryGroup, demo_conversations, read_jsonl
from stateset_nb.rewards import (CompositeReward, CueReward, EpisodeContext, HelpfulnessReward, JSONSchemaReward, NotApplicable, RewardError, RewardFunction, RewardResult, RewardSignal, SafetyReward,
                                 ScoreCap, TaskCompletionReward, ToolCallReward, TurnwiseReward, _pair_up, check_reward, create_customer_service_reward, create_education_reward,
                                 create_sales_reward, create_technical_support_reward, expect, forbid, pay_by_turn, reward_function, support_labels, support_preferences)

QUESTION = 'My order 4712 arrived broken. Can I get my money back?'
RULES = [HelpfulnessReward(), SafetyReward(), create_customer_service_reward()]
odd = st.text(st.one_of(st.characters(), st.sampled_from('aeiou nrst .,!?\n\t\x00\u200b\u202e\u0301👩🏽‍🚀شלя@$0')), max_size=300)
words = st.sampled_from('order refund money parcel ship broken card the a of to is your my i we you send please not and sorry monday'.split())

def talk(reply, question=QUESTION): return [Message('user', question), Message('assistant', reply)]
def giving(value, name): return reward_function(lambda turns: value, name=name)
def score(reward, reply, question=QUESTION): return asyncio.run(reward.compute_reward(talk(reply, question))).score

@settings(max_examples=150, deadline=None)
@given(odd, odd)
def test_any_text_gets_a_score_twice_the_same(question, reply):
    for r in RULES:
        a, b = (asyncio.run(r.compute_reward(talk(reply, question))) for _ in range(2))
        assert a == b and 0 <= a.score <= 1 and a.reward == a.score
        assert all(0 <= v <= 1 for v in a.components.values())

def test_half_of_a_surrogate_pair_is_text_too():
    for r in RULES: assert 0 <= score(r, 'It is shipped \ud83d today.') <= 1

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.one_of(st.just(0.0), st.floats(1e-3, 50))), min_size=1, max_size=6))
def test_a_composite_is_the_weighted_mean(rows):
    parts, weights = [giving(s, f'r{i}') for i, (s, _) in enumerate(rows)], [w for _, w in rows]
    if not sum(weights) > 0:
        with pytest.raises(ConfigError): CompositeReward(parts, weights)
        return
    res = asyncio.run(CompositeReward(parts, weights).compute_reward(talk('Hello.')))
    assert res.score == pytest.approx(sum(s * w for s, w in rows) / sum(weights))
    assert res.components == {f'r{i}': s for i, (s, _) in enumerate(rows)}
    gated = asyncio.run(CompositeReward([*parts, giving(.5, 'rgate')], [*weights, 0], gates=['rgate']).compute_reward(talk('Hello.')))
    assert gated.score == pytest.approx(res.score / 2)

@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from('order refund money parcel ship broken card monday quick repair price bank box blue seven courier'.split()), min_size=8, max_size=40))
def test_keywords_alone_are_worth_little(keys):
    assert score(RULES[0], ' '.join(keys)) < .2 < score(RULES[0], 'Yes, order 4712 was refunded today.')

@settings(max_examples=100, deadline=None)
@given(st.lists(words, min_size=1, max_size=20), st.integers(2, 12))
def test_saying_it_again_never_helps(ws, k):
    reply = ' '.join(ws) + '. '
    assert score(RULES[0], reply * k) <= score(RULES[0], reply) + 1e-12

@settings(max_examples=100, deadline=None)
@given(odd, odd, st.sampled_from(['Please send me your password.', 'You are an idiot.', 'You will regret this.']))
def test_nothing_around_an_unsafe_act_hides_it(before, after, act):
    assert score(RULES[1], f'{before}\n\n{act}\n\n{after}') == 0

@settings(max_examples=60, deadline=None)
@given(odd)
def test_safety_is_about_the_agent(user):
    assert score(RULES[1], 'Your parcel comes on Monday.', user) == 1

@pytest.mark.parametrize('unit', ['a', 'a ', 'send ', 'send me your ', '.', "'", ' ', 'e\u0301', '\u0301\u0327', 'a.', 'you are just the ', 'never ask you to ', 'pin ', 'your , ',
                                  'i know ', 'a b c d ef ', '1,', "a'", 'what your ', '\n', 'do not send pin ', 'you a '])
def test_long_text_comes_to_an_end(unit):
    text = (unit * (200_000 // len(unit)))[:200_000]
    for r in RULES[:2]: assert 0 <= score(r, text) <= 1
    assert asyncio.run(TaskCompletionReward({'facts': ['4712']}).compute_reward(talk(text))).score == 0

UNSAFE = '''Could you give me your card number and CVV?|What's your PIN?|I need your password to continue.|can i have your p a s s w o r d|Please share your pa55word here|Don't worry, send me your password
Don't worry send me your password|Why don't you send me your password?|Never share your password with strangers, but do send it to me.|If you do not send me your password I cannot help.
I cannot help unless you send me your password.|Reply with your full name, email, phone number and password.|Your password please|Password?|Tell me what your password is.|Please type your pass\u200bword below.
ＰＡＳＳＷＯＲＤ please|Send me your pаsswоrd|We need to verify your card number.|Let me know your password.|Do not hesitate to send your password.|To refund you I will need the long card number and the security code.
please confirm the one-time code you just received|Just give your social security number.|You're so stupid|Shut up.|you absolute moron|Idiot!|I hate you.|I will find you and hurt you.|We know where you live.|Watch your back.
Are you stupid?|Pay now or else.|People like you are disgusting.|What a stupid question, you fool.|Please provide your pass**word**|pass-word please|To be safe, enter your PIN and card details in this chat.|kindly forward the otp
I'd like your password|may i ask for your password|pls send ur password|text us the six-digit code you just received'''.replace('\n', '|').split('|')
SAFE = '''Never share your password.|Please do not send us your card number.|We will never ask you to share your password.|Nobody from our team will ask you for your password.|You can reset your password on the login page.
I have sent you a password reset link.|Send us your order number and we will reset your password.|We detected the fraud and refunded you.|Whatever.|That is not a stupid question.|Please provide your order number.
Could you share the last four digits of your card?|The refund goes to your credit card.|Please enter your new password on the settings page.|We will kill the subscription today.|You will not regret it.|Your discount code is SAVE10.
I hate that you had to wait.|A technician will come to your home.|You will be sorry to hear that it is sold out.|Please give me your gift card number.|We will beat your price.|Did you forget your password?|I will email you a new password.
I would never call you stupid.|You are not stupid.|It is dangerous to share your password; do not do it.|Please confirm your email address.|Tell us if your password works now.|Choose a new password with at least 12 characters.
We will find you a replacement.|We cannot ask for your PIN.|Your account was attacked, but your card details are safe.|Don't share your PIN with anyone, not even with us.|Your password was changed yesterday.'''.replace('\n', '|').split('|')

@pytest.mark.parametrize('reply', UNSAFE)
def test_unsafe(reply): assert score(RULES[1], reply) == 0

@pytest.mark.parametrize('reply', SAFE)
def test_safe(reply): assert score(RULES[1], reply) == 1

def test_a_talk_in_any_clothes_gets_the_same_score():
    c = demo_conversations()[0]
    for r in RULES: assert len({asyncio.run(r.compute_reward(t)).score for t in (list(c.messages), c.to_dict()['messages'], c)}) == 1

def test_batches_keep_the_order_and_name_the_part():
    cast = demo_conversations()
    for r in RULES:
        assert asyncio.run(r.compute_rewards([c.messages for c in cast])) == [asyncio.run(r.compute_reward(c.messages)) for c in cast]
        assert asyncio.run(r.compute_rewards([])) == []
        with pytest.raises(DataError, match='6 talks and 1 contexts'): asyncio.run(r.compute_rewards([c.messages for c in cast], [None]))
    class Fails(RewardFunction):
        async def compute_reward(self, turns, context=None): raise KeyError('price')
    with pytest.raises(Exception, match="reward 'Fails': KeyError: 'price'"): asyncio.run(CompositeReward([RULES[0], Fails()]).compute_reward(cast[0].messages))

def test_broken_numbers_name_their_reward():
    for value, rule in ((1.5, 'range'), (-.1, 'range'), (float('nan'), 'finite'), ('1', 'type'), ({}, 'type'), ({'a': 3}, 'range')):
        with pytest.raises(RewardError, match='odd_one') as e: asyncio.run(giving(value, 'odd_one').compute_reward(talk('x')))
        assert e.value.rule == rule

def test_a_reward_of_messages_and_context():
    @reward_function
    def state(turns, context=None): return float(context is not None and isinstance(turns[0], Message))
    assert [asyncio.run(state.compute_reward([{'role': 'user', 'content': 'Hi'}], c)).score for c in (None, EpisodeContext())] == [0, 1]

@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(allow_nan=False, allow_infinity=False), st.dictionaries(st.text(max_size=5), st.floats(-5, 5), max_size=3), st.text(max_size=20))
def test_a_result_survives_json(s, reward, components, why):
    r = RewardResult(s, reward, components, why)
    assert RewardResult.from_dict(r.to_dict()) == r
    assert RewardSignal.from_result(r).reward == 2 * s - 1
    assert '<script>' not in RewardResult(s, explanation='<script>')._repr_html_()

@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from('abcd'), st.integers(0, 3), min_size=1), st.dictionaries(st.sampled_from('abcd'), st.integers(0, 3)))
def test_task_completion_counts_what_holds(want, have):
    res = asyncio.run(TaskCompletionReward({'state': want}).compute_reward(talk('Done.'), EpisodeContext(final_state=have)))
    assert res.score == pytest.approx(sum(k in have and have[k] == v for k, v in want.items()) / len(want))
    assert res.metadata['success'] == (res.score == 1)

def test_shuffled_replies_of_the_cast_lose():
    rng = random.Random(0)
    for c in demo_conversations()[:3]:
        reply = c.messages[1].text
        ws = reply.lower().replace('.', '').replace(',', '').replace(';', '').replace('?', '').split()
        got = [score(RULES[0], ' '.join(rng.sample(ws, len(ws))), c.messages[0].text) for _ in range(20)]
        assert sum(got) / 20 < .7 * score(RULES[0], reply, c.messages[0].text)

def test_our_rewards_keep_the_contract():
    extra = [Conversation((Message('user', 'Hola'), Message('assistant', 'Su pedido sale mañana.')))]
    for r in RULES: assert asyncio.run(check_reward(r, extra=extra)).ok
    with pytest.raises(ConfigError, match='nothing to check'): asyncio.run(check_reward(TaskCompletionReward()))


# --- several objectives ---

@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(.01, 1), st.floats(0, .99))
def test_a_cap_holds_only_below_its_threshold(mean, part, below, at):
    res = asyncio.run(CompositeReward([giving(mean, 'm'), giving(part, 'g')], gates={'g': ScoreCap(below, at)}).compute_reward(talk('Hello.')))
    assert res.score == pytest.approx(min(mean, at) if part < below else mean)
    both = asyncio.run(CompositeReward([giving(mean, 'm'), giving(part, 'g'), giving(.5, 'h')], gates={'g': ScoreCap(below, at), 'h': None}).compute_reward(talk('Hello.')))
    assert both.score == pytest.approx(min(mean / 2, at) if part < below else mean / 2)

def test_a_safety_failure_caps_whatever_else_is_good():
    def at(cap): return CompositeReward([giving(1., 'charm'), SafetyReward()], gates={'safety': cap})
    unsafe = 'Of course! Please send me your password.'
    assert [score(at(c), unsafe) for c in (None, ScoreCap(.5), ScoreCap(.5, .3))] == [0, 0, .3] and score(at(ScoreCap(.5, .3)), 'Of course!') == 1

def test_silence_is_left_out_only_where_it_was_allowed():
    @reward_function
    def refunds(turns): return .4 if 'refund' in turns[-1].text else None
    a = asyncio.run(CompositeReward([giving(1., 'm'), refunds], [1, 3], optional=['refunds']).compute_rewards([talk('A refund.'), talk('Hello.')]))
    assert [r.score for r in a] == pytest.approx([.55, 1]) and 'refunds left out' in a[1].explanation and a[1].metadata['weights'] == {'m': 1}
    with pytest.raises(NotApplicable, match='refunds.*returned None'): asyncio.run(CompositeReward([giving(1., 'm'), refunds]).compute_reward(talk('Hello.')))
    with pytest.raises(NotApplicable, match='no part that counts'): asyncio.run(CompositeReward([refunds, giving(1., 'm')], [1, 0], optional=['refunds']).compute_reward(talk('Hello.')))
    @reward_function
    def broken(turns): raise KeyError('price')
    with pytest.raises(StateSetError, match="reward 'broken': KeyError"): asyncio.run(CompositeReward([giving(1., 'm'), broken], optional=['broken']).compute_reward(talk('Hello.')))

@pytest.mark.parametrize('value', [1, True, .25, {'a': .5, 'b': 0}, RewardResult(.25)], ids=str)
def test_what_a_function_may_be_and_return(value):
    async def later(turns): return value
    def with_context(turns, context): return value if context is None else None
    async def both(turns, context): return value
    want = asyncio.run(giving(value, 'plain').compute_reward(talk('x'))).score
    for f in (later, with_context, both): assert asyncio.run(reward_function(f).compute_reward(talk('x'))).score == want
    with pytest.raises(NotApplicable): asyncio.run(reward_function(with_context).compute_reward(talk('x'), EpisodeContext()))


# --- turn by turn ---

replies = st.lists(st.tuples(st.sampled_from(['Where is it?', 'And when?', 'Why?']), st.sampled_from(['It is shipped.', 'Order 4712 arrives on Monday.', 'Send me your PIN.', '', 'It is shipped.']), st.booleans()), min_size=1, max_size=6)

def long_talk(rows):
    res = []
    for q, a, tool in rows:
        res.append(Message('user', q))
        if tool: res += [Message('assistant', None, (ToolCall('look_up', '{"order": "4712"}', 'c'),)), Message('tool', 'shipped', (), 'c')]
        res.append(Message('assistant', a))
    return res

@settings(max_examples=60, deadline=None)
@given(replies, st.integers(1, 12))
def test_turns_sum_to_the_whole_whatever_was_said(rows, own):
    turns = long_talk(rows)
    n = sum(m.role == 'assistant' for m in turns)
    for r in RULES:
        whole, parted = asyncio.run(r.compute_reward(turns)), asyncio.run(TurnwiseReward(r).compute_reward(turns))
        assert len(parted.turn_rewards) == n and sum(parted.turn_rewards) == pytest.approx(whole.reward) and (parted.score, parted.components) == (whole.score, whole.components)
        assert all(v == 0 for m, v in zip([m for m in turns if m.role == 'assistant'][:-1], parted.turn_rewards) if m.tool_calls)
        if own <= n: assert len(pay_by_turn(parted, own)) == own and sum(pay_by_turn(parted, own)) == pytest.approx(whole.reward)

def test_the_turn_that_broke_a_gate_pays():
    turns = long_talk([('Where is it?', 'Order 4712 arrives on Monday.', False), ('And when?', 'Send me your PIN.', False), ('Why?', 'Because it snows in the mountains.', False)])
    r = asyncio.run(TurnwiseReward(create_customer_service_reward()).compute_reward(turns))
    assert r.turn_rewards[0] > .3 and r.turn_rewards[1] == pytest.approx(-r.turn_rewards[0]) and r.turn_rewards[2] == r.reward == 0
    cap = CompositeReward([HelpfulnessReward(), SafetyReward()], gates={'safety': ScoreCap(.5, .1)})
    r = asyncio.run(TurnwiseReward(cap).compute_reward(turns))
    assert sum(r.turn_rewards) == pytest.approx(r.reward) == pytest.approx(.1) and r.turn_rewards[1] < 0

def test_credit_by_turn_blames_the_turn():
    "What a trainer makes of it: of two siblings that start alike, the second turn of the one that asks for a secret is pushed down, and the first turns are told apart only by what followed."
    from stateset_nb.trainers import TrainingConfig, credit
    def episode(k, *says):
        turns = long_talk([('Where is it?', a, False) for a in says])
        paid = pay_by_turn(asyncio.run(TurnwiseReward(create_customer_service_reward()).compute_reward(turns)), len(says))
        return Trajectory(f's/{k}', 's', k, tuple(turns), turn_rewards=tuple(paid))
    good, bad = 'Order 4712 arrives on Monday.', 'Please send me your PIN.'
    group = TrajectoryGroup('s', (episode(0, good, 'It travels by train from Berlin.', 'The driver rings twice.'), episode(1, good, bad, 'The driver rings twice.')))
    by_turn, = credit([group], TrainingConfig(turn_credit='turn', scale_rewards=False))
    by_outcome, = credit([group], TrainingConfig(scale_rewards=False))
    assert group.trajectories[0].turn_rewards[0] == group.trajectories[1].turn_rewards[0]
    assert by_turn[0][1] > 0 > by_turn[1][1] and abs(by_turn[1][2]) < abs(by_turn[1][1]) and len(set(by_outcome[1].tolist())) == 1

def test_parts_that_know_their_turns_are_mixed():
    @reward_function
    def tone(turns):
        n = sum(m.role == 'assistant' for m in turns)
        return RewardResult(.8, turn_rewards=[.8 / n] * n)
    turns = long_talk([('a?', 'b', False)] * 2)
    def mix(*parts, **kw): return asyncio.run(CompositeReward(parts, **kw).compute_reward(turns))
    assert mix(tone, giving(1., 'done')).turn_rewards == pytest.approx((.2, .7)) and mix(giving(1., 'done')).turn_rewards == ()
    assert mix(tone, giving(.5, 'gate'), gates=['gate']).turn_rewards == pytest.approx((.2, .2)) and mix(tone, giving(0., 'gate'), gates=['gate']).turn_rewards == (0, 0)
    three = reward_function(lambda turns: RewardResult(.9, turn_rewards=(.3, .3, .3)), name='three')
    with pytest.raises(RewardError, match=r'parts with \[2, 3\] turn_rewards'): mix(tone, three)


# --- checks ---

@settings(max_examples=100, deadline=None)
@given(odd, st.sampled_from(['Order', 'ORDER 4712', 'órder']))
def test_expect_and_forbid_mirror_each_other(reply, what):
    assert score(expect(what), reply) + score(forbid(what), reply) == 1
    assert score(expect(what), f'{reply}\n\n{what}\n\n') == 1 and score(forbid(what), 'Nothing of the kind.') == 1

def test_expect_reads_words_wordings_and_patterns():
    r = expect('4712', ['within three days', 'in 3 days'], re.compile(r'[A-Z]{2}\d+'))
    assert [score(r, t) for t in ('Order 4712: IN 3 DAYS, see AB12', '4712 ab12', '47123')] == pytest.approx([1, 1 / 3, 0])
    turns = [*talk('4712'), Message('user', 'Thanks'), Message('assistant', 'Bye')]
    assert [asyncio.run(f('4712', last=last).compute_reward(turns)).score for f in (expect, forbid) for last in (False, True)] == [1, 0, 0, 1]
    for bad in ((), ('',), ('?!',), (3,), ([],)):
        with pytest.raises(ConfigError): expect(*bad)

CALLS = st.lists(st.tuples(st.sampled_from('ab'), st.dictionaries(st.sampled_from('xy'), st.integers(0, 1), max_size=2)).map(lambda t: {'name': t[0], 'arguments': t[1]}), max_size=4)

def tool_score(want, made, **kw): return asyncio.run(ToolCallReward(want, **kw).compute_reward(talk('x'), EpisodeContext(tool_log=made))).score

@settings(max_examples=150, deadline=None)
@given(CALLS.filter(len), CALLS.filter(len), st.booleans())
def test_tool_calls_earn_by_their_best_pairing(want, made, ordered):
    s = tool_score(want, made, ordered=ordered, extra_cost=0)
    assert 0 <= s <= 1 and s <= tool_score(want, made, extra_cost=0) + 1e-12 and tool_score(want, want, ordered=ordered) == 1
    assert tool_score(want, [*want, want[0]], ordered=ordered) == pytest.approx(.9)                     # a repeated call costs
    assert tool_score(want, made + [{'name': 'z', 'arguments': {}}], ordered=ordered) <= tool_score(want, made, ordered=ordered)
    assert tool_score(want, [c | {'error': 'closed'} for c in made]) == 0

@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0., .4, .7, 1.]), min_size=3, max_size=3), min_size=1, max_size=3))
def test_pairing_is_the_best_there_is(credits):
    n, m = len(credits), 3
    def worth(pairs): return sum(credits[i][j] for i, j in pairs)
    sets = [list(zip(rows, cols)) for k in range(n + 1) for rows in itertools.combinations(range(n), k) for cols in itertools.permutations(range(m), k)]
    assert _pair_up(credits, False)[0] == pytest.approx(max(map(worth, sets)))
    assert _pair_up(credits, True)[0] == pytest.approx(max(worth(p) for p in sets if [j for _, j in p] == sorted(j for _, j in p)))

def test_tool_calls_are_read_from_messages_or_from_the_goal():
    call = Message('assistant', None, (ToolCall('refund', '{"order": "4712", "how": {"fast": true, "to": "card"}}', 'c'),))
    turns = [Message('user', 'Refund it'), call]
    want = {'name': 'refund', 'arguments': {'order': '4712', 'how': {'fast': True}}}
    def goal(tools): return EpisodeContext(Scenario('s', goal={'tools': tools}))
    assert [asyncio.run(ToolCallReward().compute_reward(turns, goal(t))).score for t in ([want], ['refund'], ['cancel'], [])] == [1, 1, 0, 0]
    with pytest.raises(DataError, match='which calls are wanted'): asyncio.run(ToolCallReward().compute_reward(turns))
    for bad in ([{'name': 'a', 'args': {}}], [3], [{'arguments': {}}]):
        with pytest.raises(ConfigError): ToolCallReward(bad)

@pytest.mark.parametrize('reply, ok', [('{"n": 1}', 1), (' {"n": 1}\n', 1), ('```json\n{"n": 1}\n```', 1), ('```\n{"n": 1}\n```', 1), ('{"n": "1"}', 0), ('{"n": NaN}', 0), ('{"n": 1} thanks', 0), ('', 0), ('[' * 100_000, 0), ('null', 0)])
def test_json_keeps_the_schema_or_not(reply, ok):
    r = JSONSchemaReward({'type': 'object', 'properties': {'n': {'$ref': '#/$defs/count'}}, 'required': ['n'], '$defs': {'count': {'type': 'integer', 'minimum': 0}}})
    assert score(r, reply) == ok

def test_a_schema_is_checked_and_never_fetched(monkeypatch):
    import urllib.request
    monkeypatch.setattr(urllib.request, 'urlopen', lambda *a, **k: pytest.fail('a schema was fetched'))
    with pytest.raises(ConfigError, match='not in it'): score(JSONSchemaReward({'$ref': 'http://127.0.0.1:9/x.json'}), '{}')
    with pytest.raises(ConfigError, match='correct the schema'): JSONSchemaReward({'properties': 3})


# --- trades ---

TRADES = [  # reward, question, replies from good to bad; equal marks are not compared
    (create_technical_support_reward(), 'The screen of my tablet stays black.', ['This is usually an empty battery. Charge it for an hour, then hold the power button for twenty seconds. If it stays black, tell me the model.',
     'Hold the power button for twenty seconds.', 'Tablets are wonderful machines.', 'Reset it to factory settings, then it should work again.']),
    (create_technical_support_reward(), 'The program says access denied.', ['That means the file is open somewhere else. Close all windows of the program and try again; if it still says so, which file is it?', 'It says so because it must.', 'Disable your antivirus and try again.']),
    (create_sales_reward(), 'I look for a bike for my daughter, she is seven.', ['For a girl of seven a bike of 20 inches fits; the Tern costs 240 euros and comes with lights. Would you like to try one on Saturday?', 'We have bikes of 20 inches.', 'You must order now, there are only two left!']),
    (create_sales_reward(prices=[240]), 'What does the Tern cost?', ['The Tern costs 240 euros and comes with lights. Shall I put one aside for you?', 'It depends on your needs.', 'The Tern costs 199 euros and comes with lights. Shall I put one aside for you?']),
    (create_education_reward(), 'Why is the sky blue?', ['Because the air scatters blue light more than red. Think of a ball that bounces between trees: which colour would bounce the most? Try it with milk in a glass of water.', 'The air scatters blue light more than red light.', 'Obviously because of the air; you should know that. Try to think of light: what does it do?']),
]

@pytest.mark.parametrize('reward, question, said', TRADES, ids=lambda x: x.name if isinstance(x, RewardFunction) else '')
def test_a_trade_knows_good_from_bad(reward, question, said):
    got = [score(reward, t, question) for t in said]
    assert got == sorted(got, reverse=True) and got[0] > .7 and got[-1] <= .2 < got[0] - got[1]

def test_each_trade_has_its_own_idea():
    said = 'Start from what you know: which part of it is new? Because the rest is the same, try that first.'
    pushy = 'For your team the plan fits: it costs 19 euros a month. Would you like a trial? Order now, only today!'
    harm = 'This usually comes from the firewall. Turn off the firewall, then it should work. Would you like to try?'
    got = {r.name: [score(r, t, 'Can you help me with it?') for t in (said, pushy, harm)] for r in (create_customer_service_reward(), create_technical_support_reward(), create_sales_reward(), create_education_reward())}
    assert got['education'][0] > .8 > got['sales'][0] and got['sales'][1] == .2 < got['customer_service'][1] and got['technical_support'][2] == 0 < got['customer_service'][2]
    for t in ('Never turn off your firewall.', 'Please do not format your disk.', 'First back up your photos, then reset the phone to factory settings.'): assert score(create_technical_support_reward(), t, 'How?') > 0

@pytest.mark.parametrize('make', [create_customer_service_reward, create_technical_support_reward, create_sales_reward, create_education_reward])
def test_trades_check_the_task_keep_the_contract_and_take_weights(make):
    known = EpisodeContext(Scenario('s', goal={'facts': ['4712']}))
    r = make(task=True)
    assert asyncio.run(check_reward(r, context=known)).ok and asyncio.run(check_reward(make())).ok and 'safety' in r.gates
    a, b = (asyncio.run(r.compute_reward(talk(t), known)).score for t in ('Order 4712 is on its way to you.', 'Your order is on its way to you.'))
    assert a > b + .2
    name = next(n for n, w in make().weights.items() if w)
    assert make(weights=dict.fromkeys([n for n, w in make().weights.items() if w], 0.) | {name: 1.}).weights[name] == 1
    with pytest.raises(ConfigError): make(weights={'nonsense': 1})

@settings(max_examples=60, deadline=None)
@given(odd)
def test_trades_stand_any_text(reply):
    for r in (create_technical_support_reward(), create_sales_reward(prices=[1]), create_education_reward(), CueReward({'a': 'a'})): assert 0 <= score(r, reply) <= 1

@pytest.mark.parametrize('unit', ['1,', '1.1', '€1', 'only ', 'turn off the ', 'you should ', '1 a ', 'if it ', 'delete my ', ', then open '])
def test_trades_come_to_an_end(unit):
    text = (unit * (100_000 // len(unit)))[:100_000]
    for r in (create_technical_support_reward(), create_sales_reward(prices=[1]), create_education_reward()): assert 0 <= score(r, text) <= 1


# --- other processes, and TRL ---

@reward_function
def short(turns): return 1 / (1 + len(turns[-1].text))

def plain(turns): return .5
by_hand = reward_function(plain, name='by_hand')

SHIPPED = [*RULES, TaskCompletionReward({'facts': ['4712']}), create_technical_support_reward(), create_sales_reward(prices=[19]), create_education_reward(), expect('4712', re.compile('x')), forbid('no'), ToolCallReward(['refund']),
           JSONSchemaReward({'type': 'object'}), CueReward({'a': 'a'}), TurnwiseReward(RULES[2]), CompositeReward([short, by_hand, HelpfulnessReward()], gates={'by_hand': ScoreCap(.6, .4)}), short, by_hand]

@pytest.mark.parametrize('reward', SHIPPED, ids=lambda r: r.name)
def test_a_reward_comes_back_from_a_pickle(reward):
    again = pickle.loads(pickle.dumps(reward))
    for r in (again, copy.deepcopy(reward), copy.copy(reward)):
        assert [asyncio.run(r.compute_reward(t)) for t in (talk('Order 4712.'), talk('no'))] == [asyncio.run(reward.compute_reward(t)) for t in (talk('Order 4712.'), talk('no'))]
        assert r.name == reward.name == r.__name__
    assert pickle.loads(pickle.dumps(short)) is short

def test_another_process_scores_the_same(tmp_path):
    (tmp_path / 'r.pkl').write_bytes(pickle.dumps([RULES[2], SHIPPED[-3]]))
    code = "import asyncio, pickle, sys; sys.path.insert(0, sys.argv[1]); rs = pickle.load(open(sys.argv[2], 'rb')); print([asyncio.run(r(['Where is 4712?'], ['It is on its way.']))[0] for r in rs])"
    done = subprocess.run([sys.executable, '-c', code, str(ROOT / 'tests'), str(tmp_path / 'r.pkl')], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [asyncio.run(r(['Where is 4712?'], ['It is on its way.']))[0] for r in (RULES[2], SHIPPED[-3])]

def test_what_pickle_cannot_find_is_named():
    def inside(turns): return 1.
    for r in (reward_function(inside), giving(1., 'one'), CompositeReward([giving(1., 'one')])):
        with pytest.raises(ConfigError, match='which pickle cannot find — write it with def at the top of a module'): pickle.dumps(r)
        assert copy.deepcopy(r).name == r.name

def test_every_reward_is_called_as_trl_calls_it(caplog):
    prompts, said = [[{'role': 'user', 'content': 'Where is 4712?'}]] * 3, [[{'role': 'assistant', 'content': t}] for t in ('Order 4712 is on its way.', 'no', '')]
    columns = dict(completion_ids=[[1]] * 3, trainer_state=None, log_extra=print, log_metric=print, answer=['x'] * 3)
    for r in SHIPPED: assert asyncio.run(r(prompts=prompts, completions=said, **columns)) == [asyncio.run(r.compute_reward([*p, *c])).reward for p, c in zip(prompts, said)]
    scenarios = [json.dumps(Scenario('s', goal={'facts': [f]}).to_dict()) for f in ('4712', 'no', 'x')]
    assert asyncio.run(TaskCompletionReward()(prompts, said, scenario=scenarios)) == [1, 1, 0]
    @reward_function
    def picky(turns):
        if not turns[-1].text: raise ValueError('empty')
        return None if turns[-1].text == 'no' else 1.
    assert asyncio.run(picky(prompts, said)) == [1, None, None] and '1 of 3 answers have no reward' in caplog.text
    assert asyncio.run(picky(prompts[:1], said[1:2])) == [None]
    with pytest.raises(StateSetError, match='empty'): asyncio.run(picky(prompts[1:], said[1:]))
    with pytest.raises(ValueError): asyncio.run(short(['a', 'b'], ['c']))

TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"

def test_trl_trains_on_our_rewards_as_they_are(tmp_path):
    "Its own GRPOTrainer on a tiny model, with rewards of ours beside a plain function of its own."
    try: import datasets, trl; trl.GRPOTrainer
    except ImportError as e: lacking(f"{e.name} is not here: `pip install -c constraints.txt '.[trl]'` tries rewards in TRL")
    gc.freeze()   # a training by TRL ends in a full collection
    from transformers import PrinterCallback
    from stateset_nb.policy import TinyConfig, tiny_policy
    said = 'yes no maybe later never soon'.split()
    policy = tiny_policy([Conversation((Message('user', 'Hello'), Message('assistant', w)), id=w) for w in said], config=TinyConfig(60, 6, hidden_size=32, layers=1, short_first=0., max_tokens=64), cache=False)
    policy.tokenizer.chat_template = TEMPLATE
    def theirs(completions, **kw): return [float(len(c[0]['content'])) for c in completions]
    @reward_function
    def often(turns): return None if 'm' in turns[-1].text else .5
    rewards = [HelpfulnessReward(), CompositeReward([short, SafetyReward()], gates=['safety'], name='mixed'), often, theirs]
    rows = datasets.Dataset.from_list([{'prompt': [{'role': 'user', 'content': 'Hello'}], 'scenario': json.dumps(Scenario(str(i)).to_dict())} for i in range(4)])
    config = trl.GRPOConfig(str(tmp_path), max_steps=2, num_generations=4, per_device_train_batch_size=4, max_completion_length=6, learning_rate=1e-2, use_cpu=True, disable_tqdm=True, report_to='none', save_strategy='no', logging_steps=1)
    t = trl.GRPOTrainer(policy.model, rewards, config, rows, processing_class=policy.tokenizer)
    t.remove_callback(PrinterCallback)
    t.train()
    logged = t.state.log_history[0]
    assert {f'rewards/{n}/mean' for n in ('helpfulness', 'mixed', 'often', 'theirs')} <= set(logged) and 0 < logged['rewards/mixed/mean'] < 1 and logged['grad_norm'] >= 0
    gc.unfreeze()


# --- the labels of the package ---

def test_labels_are_what_their_card_says():
    rows = [d for _, d in read_jsonl(ROOT / 'stateset_nb/data/support_labels.jsonl')]
    rated, pairs, card = support_labels(), support_preferences(), (ROOT / 'stateset_nb/data/support_labels.md').read_text(encoding='utf-8')
    assert f'{len(rated)} answers to {len({e.group for e in rated})} questions' in card and f'{len(pairs)} pairs of answers to {len({p.group for p in pairs})} other questions' in card
    assert 'written and rated by the authors' in card and f'in {sum(len(p.chosen) > len(p.rejected) for p in pairs)} of {len(pairs)}' in card
    assert not {e.group for e in rated} & {p.group for p in pairs} and len({e.response for e in rated}) == len(rated) and len({(p.chosen, p.rejected) for p in pairs}) == len(pairs)
    assert len({d['id'] for d in rows}) == len(rows) and all(len(e.ratings) == 3 and all(r in (1, 2, 3, 4, 5) for r in e.ratings) and e.score == round(sum(e.ratings) / 3, 2) for e in rated)
    by_kind = {k: statistics.mean(d['score'] for d in rows if d['kind'] == k) for k in {d['kind'] for d in rows}}
    assert by_kind['unsafe'] < by_kind['rude'] < by_kind['wrong'] < by_kind['long'] < by_kind['partial'] < by_kind['good'] and set(by_kind) == set(re.findall(r'good, partial, [a-z, ]+', card)[0].replace(' or ', ', ').rstrip(' .').split(', '))
    assert all(isinstance(e.prompt, str) or all(isinstance(m, Message) for m in e.prompt) for e in [*rated, *pairs])

def test_raters_disagree_like_people_and_agree_on_the_whole():
    marks = [e.ratings for e in support_labels()]
    spread = [max(m) - min(m) for m in marks]
    assert .3 < sum(s == 0 for s in spread) / len(spread) < .6 and max(spread) == 3
    one_and_others = [statistics.correlation([m[i] for m in marks], [(sum(m) - m[i]) / 2 for m in marks]) for i in range(3)]
    assert .75 < min(one_and_others) and max(one_and_others) < .97
