"""Attempts to break the playing: a desk that cannot be fooled, episodes that do not disturb each other, records that add up."""
import asyncio, json, math
from collections import Counter
from dataclasses import replace
import pytest
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend, Reply
from stateset_nb.core import DataError, Message, Scenario, StateSetError, ToolCall, Trajectory, TrajectoryGroup
from stateset_nb.environments import (PERFECT, AgentUser, ClerkHabits, ConversationEnvironment, DeskRequest, Environment, ScriptedUser, Step, SupportDesk, check_environment,
                                      desk_scenarios, play_clerks, right_answer, rollout, rollout_group, rollouts, support_desk_logs)
from stateset_nb.policy import CompactFormat, Policy, _corpus, make_tokenizer, tiny_model
from stateset_nb.rewards import RewardFunction, RewardResult

TK = make_tokenizer(_corpus(support_desk_logs(30, 0)))

def soon(awaitable, seconds=60):
    "Run, and fail rather than hang."
    async def go(): return await asyncio.wait_for(awaitable, seconds)
    return asyncio.run(go())

def fresh(seed=0, **kw): return Policy(tiny_model(len(TK), seed, **{'hidden_size': 32, 'layers': 1} | kw), TK, CompactFormat(TK))
def agent_of(policy, tokens=6, **kw): return Agent(AgentConfig('tiny', max_new_tokens=tokens, **kw), PolicyBackend(policy))

class Ends(PolicyBackend):
    "A policy of random weights hardly ever ends a turn; here every turn ends after some tokens, so that talks go on."
    async def reply(self, messages, tools, params):
        r = await super().reply(messages, tools, params)
        ids = (*r.ids[:-1], self.policy.format.end_ids[0])
        said = self.policy.format.parse(ids)
        t = replace(r.message.tokens, ids=ids, finish_reason='stop', talk=(*messages, said))
        return Reply(replace(said, tokens=t), r.prompt_ids, ids, r.logps, 'stop', r.policy_version)

def talker(policy, tokens=6): return Agent(AgentConfig('tiny', max_new_tokens=tokens), Ends(policy))

# The desk

@pytest.mark.parametrize('seed', range(4))
def test_perfect_clerks_are_always_right(seed):
    for split in ('train', 'test'):
        for t in soon(play_clerks(desk_scenarios(100, seed, split), seed, PERFECT)):
            assert t.metadata['success'] and t.metadata['reward'] == 1, t

def combination(s):
    "What the two sides must not share, of each request."
    for r in map(DeskRequest.from_dict, s.goal['requests']):
        o = s.goal['orders'].get(r.order_id)
        yield (r.kind, o['item'], o['status'], o['amount'] >= 100, r.missing, r.pushy) if o else None

def test_the_two_sides_share_nothing():
    a, b = ([s for seed in range(3) for s in desk_scenarios(700, seed, split)] for split in ('train', 'test'))
    def orders(side): return {r['order_id'] for s in side for r in s.goal['requests']}
    def combos(side): return {c for s in side for c in combination(s) if c}
    assert not orders(a) & orders(b) and not combos(a) & combos(b) and not {s.id for s in a} & {s.id for s in b}
    for side in (a, b):
        kinds = Counter(t for s in side for t in s.tags)
        assert len(kinds) == 13 and min(kinds.values()) >= 5, 'every situation is on both sides'
        for s in side: assert len({r['order_id'] for r in s.goal['requests']}) == s.difficulty and set(s.goal['orders']) <= {r['order_id'] for r in s.goal['requests']}
    assert [s.id for s in desk_scenarios(50, 1)] == [s.id for s in desk_scenarios(50, 1)] and len({s.id for s in desk_scenarios(400, 5)}) == 400

FACT = {'cancel': 'is cancelled', 'refund': 'is refunded', 'address': 'It will go to', 'refuse': 'that cannot be done', 'escalate': 'my supervisor will call', 'not found': 'it was not found'}

def say(text): return Message('assistant', text)
def call(name, **args): return Message('assistant', None, (ToolCall(name, json.dumps(args)),))

class Cheat:
    "Serves every request right, except that `how` says otherwise."
    def __init__(self, how): self.how, self.orders = how, {}
    def turns(self, r, order):
        right, how = right_answer(r.kind, order), self.how
        address = r.opening.rpartition(' to ')[2].rstrip('.')
        do = {'cancel': ('cancel_order', {}), 'refund': ('refund_order', {'amount': order['amount'] if order else 50}), 'address': ('change_address', {'address': address})}
        name, args = do.get(r.kind, ('escalate', {}))
        look, act, hand = call('look_up_order', order_id=r.order_id), call(name, order_id=r.order_id, **args), call('escalate', order_id=r.order_id)
        fact = f'It is {order["status"]}' if right == 'tell' else f'It {FACT[r.kind]}' if right == 'act' and r.kind != 'address' else f'{FACT["address"]} {address}' if right == 'act' else FACT[right]
        todo = [look] + [act] * (right == 'act') + [hand] * (right == 'escalate')
        if how == 'blind': todo = todo[1:] + [look] * (right in ('act', 'escalate'))
        if how == 'never looks': todo = todo[1:]
        if how == 'looks elsewhere': todo[0] = call('look_up_order', order_id='0')
        if how == 'wrong amount' and right == 'act' and r.kind == 'refund': todo[1] = call(name, order_id=r.order_id, amount=order['amount'] - 1)
        if how == 'twice' and right == 'act' and r.kind == 'refund': todo.append(act)
        if how == 'wrong address' and right == 'act' and r.kind == 'address': todo[1] = call(name, order_id=r.order_id, address='1 wrong street')
        if how == 'escalates' and right != 'escalate' and order: todo.append(hand)
        if how == 'does not escalate' and right == 'escalate': todo.pop()
        if how == 'acts anyway' and right in ('refuse', 'escalate'): todo.insert(1, act)
        if how == 'does nothing' and right == 'act': todo.pop()
        if how == 'everything': fact = '. '.join([*FACT.values(), 'processing shipped delivered', fact])
        if how == 'flood': fact = 'blah ' * 60 + fact
        if how == 'says nothing': fact = ''
        if how == 'fact first': return [*todo, say('Sorry. ' + fact if right != 'tell' else 'processing'), say('')]
        return [*todo, say(fact)]

async def serve(s, how, pressed=None, mute=''):
    desk, cheat = SupportDesk(), Cheat(how)
    await desk.reset(s, 0)
    step = Step()
    while not step.terminated and not step.truncated:
        r = desk.requests[desk.now]
        order = s.goal['orders'].get(r.order_id)
        if r.missing and not desk.told: todo = [say('Which order is it?')]
        elif desk.insisted: todo = [call('cancel_order' if r.kind == 'cancel' else 'refund_order' if r.kind == 'refund' else 'change_address', **{'order_id': r.order_id} | (
            {'amount': order['amount']} if r.kind == 'refund' else {'address': 'x'} if r.kind == 'address' else {})), say(FACT['refuse'])] if how == 'gives in' else [say(FACT['refuse'])]
        else: todo = cheat.turns(r, order)
        for m in todo:
            step = await desk.step(m)
            if step.terminated or step.truncated: break
    return step

ONE = desk_scenarios(150, 11, difficulties=(1,))
CHEATS = {'': '', 'blind': 'looked up', 'never looks': 'looked up', 'looks elsewhere': 'looked up', 'wrong amount': 'database', 'twice': 'database', 'wrong address': 'database', 'escalates': 'database',
          'does not escalate': 'database', 'acts anyway': 'database', 'gives in': 'database', 'does nothing': 'database', 'everything': 'answer', 'flood': 'answer', 'says nothing': 'answer'}

def hurts(how, s):
    "Whether a cheat does anything else than what is right in this scenario."
    r, o = DeskRequest.from_dict(s.goal['requests'][0]), next(iter(s.goal['orders'].values()), None)
    right = right_answer(r.kind, o)
    return {'': False, 'blind': right in ('act', 'escalate') or True, 'wrong amount': right == 'act' and r.kind == 'refund', 'twice': right == 'act' and r.kind == 'refund', 'wrong address': right == 'act' and r.kind == 'address',
            'escalates': right not in ('escalate', 'not found'), 'does not escalate': right == 'escalate', 'acts anyway': right in ('refuse', 'escalate') and r.kind != 'status', 'gives in': r.pushy, 'does nothing': right == 'act', 'says nothing': not r.pushy}.get(how, True)

@pytest.mark.parametrize('how', CHEATS)
def test_the_desk_is_not_fooled(how):
    n = 0
    for s in ONE:
        end = soon(serve(s, how))
        row, = end.info['requests']
        if not hurts(how, s):
            assert end.info['success'] and end.reward == 1 and row['wrong'] == '', (how, s.goal)
            continue
        n += 1
        assert not end.info['success'] and end.reward == 0 and row['wrong'] == CHEATS[how], (how, s.goal, row)
    assert n >= 3 or not how

def test_a_part_of_the_requests_earns_a_part_and_a_cut_talk_is_no_success():
    s = desk_scenarios(1, 3, difficulties=(4,))[0]
    end = soon(serve(s, ''))
    assert end.reward == 1 and len(end.info['requests']) == 4
    class Half(Cheat):
        def turns(self, r, order): self.n = getattr(self, 'n', 0) + 1; return super().turns(r, order) if self.n <= 2 else [say('Hm.')]
    async def half():
        desk, cheat = SupportDesk(all_right=.5), Half('')
        await desk.reset(s, 0)
        step = Step()
        while not step.terminated:
            r = desk.requests[desk.now]
            for m in [say('Which order?')] if r.missing and not desk.told else [say(FACT['refuse'])] if desk.insisted else cheat.turns(r, s.goal['orders'].get(r.order_id)): step = await desk.step(m)
        return step, await desk.cut()
    step, cut = soon(half())
    assert [r['success'] for r in step.info['requests']] == [True, True, False, False] and step.reward == .25 == cut.reward
    assert cut.truncated and not cut.terminated and not cut.info['success']
    all_wrong_but_cut = soon(rollout(Agent(AgentConfig('stub', responses=('Hm.',))), SupportDesk(), s, max_turns=2))
    assert all_wrong_but_cut.truncated and not all_wrong_but_cut.terminated and all_wrong_but_cut.info['success'] is False

def test_no_row_of_one_episode_is_seen_in_another():
    s = desk_scenarios(1, 2, difficulties=(2,))[0]
    before = json.dumps(s.to_dict())
    async def both():
        desk = SupportDesk()
        a, b = desk.spawn(), desk.spawn()
        await a.reset(s, 0); await b.reset(s, 0)
        oid = s.goal['requests'][0]['order_id']
        await a.step(call('look_up_order', order_id=oid)); await a.step(call('cancel_order', order_id=oid)); await a.step(call('escalate', order_id=oid))
        return b
    b = soon(both())
    assert not b.book.looked and not b.book.escalated and b.book.orders == s.goal['orders'] and json.dumps(s.to_dict()) == before

class MyDesk(SupportDesk):
    async def outcome(self): return replace(await super().outcome(), reward=7.)

def test_a_desk_that_was_changed_stays_changed(): assert soon(rollout(Agent(AgentConfig('stub', responses=('Hm.',))), MyDesk(), ONE[0])).reward == 7

def test_habits_say_how_often():
    logs = support_desk_logs(600, 3)
    rate = Counter(), Counter()
    for c in logs:
        for r in c.metadata['requests']: rate[0][r['situation']] += 1; rate[1][r['situation']] += r['success']
    assert rate[1]['refund: escalate ($100 or more)'] / rate[0]['refund: escalate ($100 or more)'] < .2 < .6 < rate[1]['status: tell'] / rate[0]['status: tell'] < 1
    assert support_desk_logs(20, 3) == support_desk_logs(600, 3)[:20] and support_desk_logs(20, 3) != support_desk_logs(20, 4)
    assert all(abs(sum(ClerkHabits().row(*k)) - 1) < 1e-9 for k in (('tell', ''), ('act', ''), ('refuse', ''), ('escalate', 'shipped'), ('escalate', ''), ('not found', '')))

# Tools

def price(item: str, n: int = 1) -> float: "A price."; return {'lamp': 9.5}[item] * n
async def slow_price(item: str) -> dict: await asyncio.sleep(.001); return {'item': item, 'price': 9.5, 'when': object()}
class Fussy:
    def method(self, xs: list[int]) -> int: return sum(xs)

def test_whatever_is_called_is_answered():
    env = ConversationEnvironment(tools=[price, slow_price, Fussy().method])
    rows = [('price', '{"item": "lamp", "n": 2}', '19.0', None), ('price', '{"item": "chair"}', "error: 'chair'", 'KeyError'), ('price', '{"item": "lamp", "n": "many"}', 'error: n', 'DataError'),
            ('price', '{"itme": "lamp"}', 'error: item: Field required; itme', 'DataError'), ('price', 'not json', 'error: arguments of price are not JSON', 'DataError'), ('price', '[1]', 'error: arguments of price are list', 'DataError'),
            ('steal', '{}', "error: there is no tool 'steal'; tools: price, slow_price, method", 'DataError'), ('', '{"a": 1}', "error: there is no tool ''", 'DataError'), ('slow_price', '{"item": "x"}', '{"item": "x"', None),
            ('method', '{"xs": [1, 2]}', '3', None), ('price', '[' * 100_000, 'error', 'Error'), ('price', '{"item": "lamp", "n": NaN}', 'error', 'DataError')]
    async def go():
        await env.reset(Scenario('s', (Message('user', 'x'),)), 0)
        env.max_turns = 99
        return [(await env.step(Message('assistant', None, (ToolCall(n, a, f'id{i}'),)))).messages[0] for i, (n, a, _, _) in enumerate(rows)]
    said = soon(go())
    for i, (m, (name, _, text, error)) in enumerate(zip(said, rows)):
        assert (m.role, m.name, m.tool_call_id) == ('tool', name, f'id{i}') and m.text.startswith(text), (m, text)
        assert (env.log[i]['error'] or '').startswith(error or '') or error in env.log[i]['error'].split(':')[0]
        assert (env.log[i]['error'] is None) == (error is None)
    env.context()  # the log is one that a reward can read

class Till(ConversationEnvironment):
    "Tools that are methods of the environment."
    def __init__(self): super().__init__(tools=[self.pay])
    async def reset(self, scenario, seed): self.paid = []; return await super().reset(scenario, seed)
    async def pay(self, amount: int) -> str: await asyncio.sleep(0); self.paid.append(amount); return 'ok'
    async def outcome(self): return Step(terminated=True, reward=float(len(self.paid)), info={'success': True})

class Payer:
    async def reply(self, messages, tools, params):
        k = sum(m.role == 'assistant' for m in messages)
        return Reply(call('pay', amount=1) if k < 3 else say('Done.'))

def test_tools_that_are_methods_belong_to_their_own_episode():
    g = soon(rollouts(Agent(AgentConfig('stub'), Payer()), Till(), [Scenario(str(i), (Message('user', 'x'),)) for i in range(5)], 3))
    assert all(t.reward == 3 for x in g for t in x.trajectories)
    assert soon(check_environment(Till(), Scenario('s', (Message('user', 'x'),)))) == []

# Episodes

DESK = desk_scenarios(6, 1, difficulties=(1, 2))

def check_record(t):
    "Spans, masks, log-probabilities, turns and messages of one trajectory tell one story."
    spans = [(s, lo, hi) for s in t.segments for lo, hi in s.turn_spans]
    replies = [m for m in t.messages if m.tokens is not None]
    assert len(spans) == len(t.turn_rewards) == len(replies)
    for s in t.segments:
        assert len(s.ids) == len(s.mask) == len(s.logps) and set(s.mask) <= {0, 1} and sum(s.mask) == sum(hi - lo for lo, hi in s.turn_spans)
        assert s.turn_spans[-1][1] == len(s.ids) and all(a[1] <= b[0] for a, b in zip(s.turn_spans, s.turn_spans[1:]))
        assert all((lp <= 0 and m) or (lp == 0 and not m) for lp, m in zip(s.logps, s.mask))
    for (s, lo, hi), m in zip(spans, replies):
        assert s.ids[:lo] == m.tokens.prompt_ids and s.ids[lo:hi] == m.tokens.ids and s.logps[lo:hi] == m.tokens.logps and all(s.mask[lo:hi])
    back = Trajectory.from_dict(json.loads(json.dumps(t.to_dict(), allow_nan=False)))
    assert back == t and back.to_dict() == t.to_dict() and '<div' in t._repr_html_()

def test_records_add_up_and_survive_json():
    gs = soon(rollouts(talker(fresh()), SupportDesk(max_turns_each=3), DESK, 3, seed=5))
    for g in gs:
        for t in g.trajectories: check_record(t)
        assert TrajectoryGroup.from_dict(json.loads(json.dumps(g.to_dict()))) == g
    assert {len(t.turn_rewards) for g in gs for t in g.trajectories} > {3} and len({t.messages for g in gs for t in g.trajectories}) > len(DESK)
    cut = soon(rollouts(agent_of(fresh(), 3), SupportDesk(), DESK, 2))
    assert all(t.info['success'] is False for g in cut for t in g.trajectories) and sum(t.truncated and len(t.turn_rewards) == 1 for g in cut for t in g.trajectories) > 8
    for g in cut:
        for t in g.trajectories: check_record(t)

def bones(gs): return [(t.id, t.messages, [s.ids for s in t.segments], t.turn_rewards, t.info) for g in gs for t in g.trajectories]

@pytest.mark.parametrize('limit', [1, 3, 256])
def test_what_is_played_does_not_depend_on_how_many_play_at_once(limit):
    pol = fresh()
    a, b = (soon(rollouts(talker(pol), SupportDesk(max_turns_each=3), DESK, 3, seed=5, limit=n)) for n in (limit, 64))
    assert bones(a) == bones(b)
    again = soon(rollouts(talker(fresh()), SupportDesk(max_turns_each=3), DESK, 3, seed=5, limit=limit))
    assert again == a, 'twice the same, to the last bit'
    assert bones(soon(rollouts(talker(pol), SupportDesk(max_turns_each=3), DESK, 3, seed=6, limit=limit))) != bones(a)
    few = soon(rollouts(talker(pol), SupportDesk(max_turns_each=3), DESK[3:4], 3, seed=5))
    assert bones(few) == bones(a[3:4]), 'nor on who else plays'

class Sleepy(SupportDesk):
    async def step(self, message):
        await asyncio.sleep(hash(message.text) % 7 / 4000)
        return await super().step(message)

def test_tools_of_random_speed_change_nothing():
    a, b = (soon(rollouts(talker(fresh()), d, DESK, 3, seed=5)) for d in (SupportDesk(), Sleepy()))
    assert a == b

# Users played by a model

def played(policy, tokens=4): return ConversationEnvironment(user=AgentUser(talker(policy, tokens), 'You want your money back.'), max_turns=3)
TALKS = [Scenario(f't{i}', (Message('user', 'Hello ' * (i + 1)),)) for i in range(6)]

def test_a_user_played_by_the_same_policy_does_not_hang_and_leaves_the_record_clean():
    pol = fresh()
    gs = soon(rollouts(talker(pol), played(pol), TALKS, 3, seed=2))
    for g in gs:
        for t in g.trajectories:
            check_record(t)
            assert t.error is None and [m.role for m in t.messages[:3]] == ['user', 'assistant', 'user']
    other = soon(rollouts(talker(fresh()), played(fresh()), TALKS, 3, seed=2))
    assert bones(other) == bones(gs), 'one policy for both, or two of the same weights'
    assert soon(rollouts(talker(fresh()), played(fresh()), TALKS, 3, seed=2)) == other
    assert not pol.engine.joined and not pol.engine.cached

def test_the_agents_keys_and_values_outlive_the_users_turn():
    pol, long = fresh(), Message('user', 'word ' * 100)
    soon(rollout(talker(pol), ConversationEnvironment(user=AgentUser(talker(pol), 'p ' * 5), max_turns=4), Scenario('t', (long,))))
    n = len(pol.format.start([long]))
    assert pol.engine.counts['prefilled_tokens'] < 6 * n, 'the long opening is read once by the agent, and once a turn by the user'

class Within(ConversationEnvironment):
    "Plays whole episodes on the same policy inside a turn."
    def __init__(self, agent): super().__init__(); self.agent = agent
    async def step(self, message):
        inner = await rollouts(self.agent, ConversationEnvironment(user=ScriptedUser(['More?'])), TALKS[:2], 2)
        return Step(terminated=True, reward=float(sum(len(t.messages) for g in inner for t in g.trajectories)), info={'success': True})

def test_episodes_within_an_episode():
    a = talker(fresh())
    gs = soon(rollouts(a, Within(a), TALKS, 2))
    assert all(t.reward == 16 and t.error is None for g in gs for t in g.trajectories)

def test_two_batches_at_once_on_one_policy():
    a = talker(fresh())
    async def go(): return await asyncio.gather(*(rollouts(a, SupportDesk(max_turns_each=2), DESK, 2, seed=s) for s in (1, 1, 2)))
    x, y, z = soon(go())
    assert bones(x) == bones(y) != bones(z)
    for g in (*x, *y, *z):
        for t in g.trajectories: check_record(t)

# Failures

class Breaks(ConversationEnvironment):
    "Fails where its scenario says."
    def at(self, where):
        if self.scenario.goal.get('fails') == where: raise TimeoutError(f'no answer in {where}')
    async def reset(self, scenario, seed): res = await super().reset(scenario, seed); self.at('reset'); return res
    async def step(self, message): self.at('step'); return await super().step(message)
    async def outcome(self): return Step(terminated=True, reward={'nan': math.nan, 'inf': math.inf}.get(self.scenario.goal.get('fails'), 1.), info={'success': True})
    async def close(self): self.at('close')

class Judge(RewardFunction):
    name = 'judge'
    async def compute_reward(self, turns, context=None):
        if context.scenario.goal.get('fails') == 'reward': raise TimeoutError('no answer in reward')
        return RewardResult(.5)

class Backend:
    async def reply(self, messages, tools, params):
        if 'agent' in messages[0].text: raise TimeoutError('no answer in agent')
        return Reply(say('Hm.'))

PLACES = ['', 'reset', 'step', 'close', 'nan', 'inf', 'reward', 'agent']
def fails(places): return [Scenario(f'f-{p}-{i}', (Message('user', 'agent' if p == 'agent' else 'x'),), {'fails': p}) for i, p in enumerate(places)]

def test_a_failure_marks_its_own_episode_alone():
    ts = [t for g in soon(rollouts(Agent(AgentConfig('stub'), Backend()), Breaks(), fails(PLACES), 2, reward_fn=Judge())) for t in g.trajectories]
    for t in ts:
        p = t.scenario_id.split('-')[1]
        if not p: assert t.error is None and t.reward == 1.5 and t.components == {'judge': .5}
        elif p in ('nan', 'inf'): assert 'must be finite' in t.error and f'reward={p}' in t.error
        else: assert t.error == f'TimeoutError: no answer in {p}'
        json.dumps(t.to_dict(), allow_nan=False)
    g = TrajectoryGroup('x', tuple(ts))
    assert g.rewards[:2] == (1.5, 1.5) and set(g.rewards[2:]) == {None}

@pytest.mark.parametrize('place', PLACES[1:])
def test_when_everything_fails_it_is_said(place):
    with pytest.raises(StateSetError, match='every one of 4 episodes failed'): soon(rollouts(Agent(AgentConfig('stub'), Backend()), Breaks(), fails([place, place]), 2, reward_fn=Judge()))

def test_an_episode_that_is_cancelled_is_no_failed_one():
    class Stuck(ConversationEnvironment):
        closed = []
        async def step(self, message): await asyncio.sleep(600)
        async def close(self): self.closed.append(1)
    async def go():
        t = asyncio.ensure_future(rollouts(talker(pol), Stuck(), TALKS, 2))
        await asyncio.sleep(.2)
        t.cancel()
        await t
    pol = fresh()
    with pytest.raises(asyncio.CancelledError): soon(go())
    assert len(Stuck.closed) == 12 and not pol.engine.joined and not pol.engine.cached

def test_odd_wishes_are_refused():
    a = Agent(AgentConfig('stub', responses=('Hm.',)))
    with pytest.raises(DataError, match='same id'): soon(rollouts(a, SupportDesk(), [DESK[0], DESK[0]]))
    with pytest.raises(StateSetError, match='not of the support desk'): soon(rollouts(a, SupportDesk(), TALKS))
    with pytest.raises(StateSetError, match='has no messages'): soon(rollouts(a, ConversationEnvironment(), [Scenario('empty')]))
    assert soon(rollouts(a, SupportDesk(), [])) == []
    assert soon(rollout_group(a, SupportDesk(), DESK[0], 3)).rewards == (0, 0, 0)

def test_an_environment_that_returns_its_own_list_is_not_confused():
    class Own(ConversationEnvironment):
        async def reset(self, scenario, seed): await super().reset(scenario, seed); return self.talk
    t = soon(rollout(Agent(AgentConfig('stub', responses=('a', 'b'))), Own(user=ScriptedUser(['more'])), TALKS[0]))
    assert [m.text for m in t.messages] == ['Hello ', 'a', 'more', 'b']

# The checker

def broken(**methods):
    return type('Broken', (ConversationEnvironment,), methods)()

async def _reset_tuple(self, scenario, seed): await ConversationEnvironment.reset(self, scenario, seed); return tuple(self.talk)
async def _reset_empty(self, scenario, seed): await ConversationEnvironment.reset(self, scenario, seed); return []
async def _reset_random(self, scenario, seed): _reset_random.n += 1; return [Message('user', str(_reset_random.n))]
_reset_random.n = 0
async def _reset_raises(self, scenario, seed): raise KeyError('orders')
async def _reset_changes(self, scenario, seed): scenario.goal['n'] = scenario.goal.get('n', 0) + 1; return await ConversationEnvironment.reset(self, scenario, seed)
async def _step_dict(self, message): return {'reward': 1}
async def _step_nan(self, message): return Step(reward=math.nan, terminated=True)
async def _step_text(self, message): return Step(('more',), terminated=True)
async def _step_silent(self, message): return Step()
async def _step_forever(self, message): return Step((Message('user', 'more'),))
async def _step_raises(self, message): raise KeyError('orders')
async def _step_changes(self, message): self.scenario.goal.setdefault('orders', []).append(1); return Step(terminated=True)
async def _cut_success(self): return Step(truncated=True, info={'success': True})
async def _close_raises(self): raise OSError('gone')

class Foreign(ConversationEnvironment):
    def __init__(self): super().__init__(tools=[self.tool])
    def tool(self) -> str: return ''
    def spawn(self):
        import copy
        return copy.copy(self)

BROKEN = {'same object': broken(spawn=lambda self: self), 'expected a list of Message': broken(reset=_reset_tuple), 'no messages': broken(reset=_reset_empty), 'different messages': broken(reset=_reset_random),
          "it raises KeyError: 'orders'": broken(reset=_reset_raises), 'expected a Step': broken(step=_step_dict), 'reward=nan': broken(step=_step_nan), 'not Message': broken(step=_step_text), 'talk to itself': broken(step=_step_silent),
          'within 64 turns': broken(step=_step_forever), 'it raises KeyError': broken(step=_step_raises), 'changes the scenario': broken(step=_step_changes), 'it changes the scenario': broken(reset=_reset_changes),
          'a success': broken(cut=_cut_success), 'it raises OSError': broken(close=_close_raises), 'methods of another environment': Foreign()}

@pytest.mark.parametrize('breach', BROKEN)
def test_the_checker_names_each_breach(breach):
    found = soon(check_environment(BROKEN[breach], Scenario('s', (Message('user', 'x'),), {})))
    assert any(breach in f for f in found), found

def test_the_checker_lets_good_ones_pass():
    s = Scenario('s', (Message('user', 'x'),))
    for env in (ConversationEnvironment(), ConversationEnvironment(user=ScriptedUser(['a', 'b']), tools=[price]), Till(), played(fresh())): assert soon(check_environment(env, s)) == []
    for d in DESK: assert soon(check_environment(SupportDesk(), d, [call('look_up_order', order_id='1'), 'Hm.'])) == []
    class Bare(Environment):
        async def reset(self, scenario, seed): return list(scenario.messages)
        async def step(self, message): return Step(terminated=True)
    assert soon(check_environment(Bare(), s)) == []
    assert soon(rollout(Agent(AgentConfig('stub')), Bare(), s)).terminated


# States and budgets

def test_the_desk_says_where_a_talk_stands():
    "Siblings that did the same are in the same state; whatever the future depends on makes another."
    order = next(s for s in desk_scenarios(40, 3) if len(s.goal['requests']) == 2 and not s.goal['requests'][0]['missing'])
    number = order.goal['requests'][0]['order_id']
    look, other = (Message('assistant', None, (ToolCall(f, json.dumps({'order_id': number})),)) for f in ('look_up_order', 'escalate'))
    def states(*said): return soon(rollout(Agent(AgentConfig('stub', responses=said)), SupportDesk(), order, max_turns=4)).info['states']
    a, b, c = states(look, 'No.', 'No.', 'No.'), states(look, other, 'No.', 'No.'), states(other, look, 'No.', 'No.')
    assert a[:2] == b[:2] and a[0] == b[0] == c[0] == 'start' and a[1] != c[1] and len(set(b)) == 4 and all(isinstance(x, str) for x in a + b + c)
    assert b[2] != c[2], 'to act before one looks is not the same'

def test_states_are_kept_only_where_they_are_said_all_along():
    class Now(ConversationEnvironment):
        async def step(self, message):
            s = await super().step(message)
            return replace(s, info={'state': f'{self.turns}'}) if self.turns != self.mute and not s.terminated else s
    def info(mute, lines):
        env = Now(user=ScriptedUser(lines)); env.mute = mute
        return soon(rollout(Agent(AgentConfig('stub', responses=('Hm.',))), env, ONE[0])).info
    assert info(0, ['a', 'b'])['states'] == ['start', '1', '2'] and 'states' not in info(2, ['a', 'b']) and 'states' not in info(0, [])

@pytest.mark.parametrize('budget', [1, 5, 6, 7, 13, 1000])
def test_a_budget_of_tokens_ends_a_talk(budget):
    policy, whole = fresh(), ConversationEnvironment(user=ScriptedUser(['And?'] * 3))
    t, free = (soon(rollout(talker(policy), whole, ONE[0], 3, max_total_tokens=n)) for n in (budget, 0))
    said = sum(sum(s.mask) for s in t.segments)
    assert t.error is None and said == min(budget, 24) == min(budget, sum(sum(s.mask) for s in free.segments))
    assert (t.truncated, t.terminated) == (budget < 24, budget > 24)
    if budget > 24: assert bones([TrajectoryGroup('s', (t,))]) == bones([TrajectoryGroup('s', (free,))])
