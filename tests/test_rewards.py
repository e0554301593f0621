"""Rewards: numbers stay in range on any text, mixtures are means, and work grows no faster than the text."""
import asyncio, random
import pytest
from hypothesis import given, settings, strategies as st
from stateset_nb.core import ConfigError, Conversation, DataError, Message, demo_conversations
from stateset_nb.rewards import (CompositeReward, EpisodeContext, HelpfulnessReward, RewardError, RewardFunction, RewardResult, RewardSignal, SafetyReward, TaskCompletionReward,
                                 check_reward, create_customer_service_reward, reward_function)

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
