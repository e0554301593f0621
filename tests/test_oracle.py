"""The whole loop against what is known: bandits whose gradient and optimum can be counted out, and updates written out row by row."""
import asyncio, copy, math, statistics
from collections import Counter
from dataclasses import replace
from itertools import product
import pytest, torch
from scipy import stats
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
from stateset_nb.core import Message, Scenario, Segment, Trajectory, TrajectoryGroup
from stateset_nb.environments import Environment, Step, rollouts
from stateset_nb.policy import ChatFormat, Policy, tiny_model
from stateset_nb.trainers import MultiTurnGRPOTrainer, SingleTurnGRPOTrainer, TrainingConfig, backward, make_rows, micro_batches

def soon(awaitable, seconds=120):
    "Run, and fail rather than hang."
    async def go(): return await asyncio.wait_for(awaitable, seconds)
    return asyncio.run(go())

class Numbers(ChatFormat):
    "Messages are the token numbers themselves; nothing is encoded."
    def __init__(self, ends): super().__init__(None); self.ends = tuple(ends)
    @property
    def end_ids(self): return self.ends
    def start(self, messages, tools=None): return tuple(int(w) for m in messages for w in m.text.split())
    def extend(self, ids, before, new, tools=None): return ids + self.start(new), False
    def parse(self, ids): return Message('assistant', ' '.join(map(str, ids)))

def policy_of(vocab, ends, loud=.1, seed=2):
    "A tiny policy in float64 that already prefers some tokens: its embeddings are larger than those of a new one."
    model = tiny_model(vocab, seed, 16, 1, 64)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=loud)
    return Policy(model.double(), None, Numbers(ends))

def agent_of(policy): return Agent(AgentConfig('numbers', max_new_tokens=1), PolicyBackend(policy))

def flat(policy):
    "The gradient as one vector; afterwards there is none."
    g = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    return g

# Bandits: a turn is one token. The table: arms pulled so far -> (reward of the turn, what is said next; None at the end)

ARMS = 4
ONE = {(a,): (r, None) for a, r in enumerate([0., .2, 1., -.3])}
# 0 goes home with a little; 1 pays at once and leads nowhere; 3 costs something and leads to the best pair
TWO = {(0,): (.2, None), (1,): (.4, '1'), (2,): (0., '2'), (3,): (-.2, '3')}
TWO |= {(k, a): (r, None) for k, rs in ((1, [0., -.2, .1, 0.]), (2, [.6, .2, 0., .3]), (3, [.8, 1.5, .6, .8])) for a, r in enumerate(rs)}
TABLES = {'one turn': ONE, 'two turns': TWO}

class Bandit(Environment):
    "Pays by its table."
    def __init__(self, table): self.table = table
    async def reset(self, scenario, seed): self.pulled = (); return list(scenario.messages)
    async def step(self, message):
        self.pulled += (int(message.text),)
        reward, said = self.table[self.pulled]
        return Step(reward=reward, terminated=True) if said is None else Step((Message('user', said),), reward)

def starts(n): return [Scenario(f's{i}', (Message('user', '0'),)) for i in range(n)]

def outcomes(table):
    "Every way an episode can go: tokens, mask, reward of each turn."
    for arms in (p for p, (_, said) in table.items() if said is None):
        ids, mask, rewards = (0,), (0,), ()
        for k, a in enumerate(arms):
            reward, said = table[arms[:k + 1]]
            ids, mask, rewards = (*ids, a), (*mask, 1), (*rewards, reward)
            if said is not None: ids, mask = (*ids, int(said)), (*mask, 0)
        yield ids, mask, rewards

def chance(policy, ids, mask):
    "How likely an episode is, by a plain pass; differentiable."
    lp = policy.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(lp[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]).exp()

def expected_reward(policy, table):
    "What the policy earns on average, counted out."
    return sum(chance(policy, ids, mask) * sum(rs) for ids, mask, rs in outcomes(table))

def true_gradient(policy, table):
    "Of the expected reward, counted out."
    expected_reward(policy, table).backward()
    return flat(policy)

def estimate(policy, rows, config, n):
    "The library's gradient of the loss over some rows; n of them make a step."
    for batch in micro_batches(rows, config.micro_batch_tokens): backward(policy, batch, None, None, config, n, n)
    return flat(policy)

# How many tokens an episode of the second bandit has is chance: there only a constant denominator leaves no bias
PLAIN = TrainingConfig(scale_rewards=False, max_completion_length=1, loss_type='dr_grpo', gae_lambda=1.)
CASES = [('one turn', 'outcome', 'dapo'), ('one turn', 'outcome', 'grpo'), ('one turn', 'turn', 'dr_grpo'), ('two turns', 'outcome', 'dr_grpo'), ('two turns', 'turn', 'dr_grpo'), ('two turns', 'gae', 'dr_grpo')]

def counted(policy, table, config, G):
    "The expectation of the library's gradient: every group of G outcomes there is, weighted by its probability."
    ways = list(outcomes(table))
    with torch.no_grad(): ps = [float(chance(policy, ids, mask)) for ids, mask, _ in ways]
    assert abs(sum(ps) - 1) < 1e-9
    def episode(ids, mask, rs): return Trajectory('', 's', 0, segments=(Segment(ids, mask, (0.,) * len(ids), tuple((t, t + 1) for t, m in enumerate(mask) if m)),), turn_rewards=rs)
    episodes = [episode(*w) for w in ways]
    groups = list(product(range(len(ways)), repeat=G))
    expected = [torch.tensor([.3, *(.2 * t.segments[0].ids[2] for _ in t.turn_rewards[1:])], dtype=torch.float64) for t in episodes]   # wrong, but only by where one stands: the first turn, or what was said to it
    rows = make_rows([TrajectoryGroup('s', tuple(episodes[i] for i in g)) for g in groups], config, [expected[i] for g in groups for i in g])
    weights = [math.prod(ps[i] for i in g) for g in groups for _ in g]
    return estimate(policy, [replace(r, advantages=tuple(w * a for a in r.advantages)) for r, w in zip(rows, weights) if any(r.advantages)], config, G)

@pytest.mark.parametrize('kind, credit, loss', CASES)
@pytest.mark.parametrize('G', [2, 3])
def test_over_all_groups_there_are_the_estimator_is_the_gradient(kind, credit, loss, G):
    "Nothing is sampled. That one's own reward is in the mean costs the factor (G-1)/G, and nothing else; what is expected of a state costs nothing, however wrong."
    policy = policy_of(ARMS, range(ARMS))
    truth = true_gradient(policy, TABLES[kind])
    got = counted(policy, TABLES[kind], replace(PLAIN, turn_credit=credit, loss_type=loss), G)
    assert float(truth.norm()) > .05
    assert float((got + (1 if credit == 'gae' else (G - 1) / G) * truth).norm() / truth.norm()) < 1e-6

@pytest.mark.parametrize('kind, credit, loss', CASES[:1] + CASES[3:5])
def test_over_sampled_groups_the_estimator_is_the_gradient_within_its_interval(kind, credit, loss):
    "Played by the policy, as in training. Means of 40 batches of groups, with intervals that hold in 999 of 1000 cases."
    G, batches, size, table = 4, 40, 15, TABLES[kind]
    policy, config = policy_of(ARMS, range(ARMS)), replace(PLAIN, turn_credit=credit, loss_type=loss)
    truth = true_gradient(policy, table)
    groups = soon(rollouts(agent_of(policy), Bandit(table), starts(batches * size), G, seed=2))
    with torch.no_grad(): ways = {ids: float(chance(policy, ids, mask)) for ids, mask, _ in outcomes(table)}
    seen = Counter(t.segments[0].ids for g in groups for t in g.trajectories)
    assert not seen.keys() - ways.keys()
    assert stats.chisquare([seen[i] for i in ways], [p * len(groups) * G for p in ways.values()]).pvalue > .001, 'outcomes do not come as often as the policy says'
    parts = torch.stack([-estimate(policy, make_rows(groups[i:i + size], config), config, size * G) for i in range(0, len(groups), size)])
    def interval(direction):
        x = (parts @ direction).numpy()
        half = stats.t.ppf(.9995, batches - 1) * x.std(ddof=1) / batches ** .5
        return x.mean() - half, x.mean() + half
    low, high = interval(truth / truth.norm() ** 2)   # the estimate along the true gradient, in lengths of it
    assert low < (G - 1) / G < high and low > .5 and high < 1
    across = torch.linalg.qr(torch.cat([truth[:, None], torch.randn(len(truth), 8, generator=torch.Generator().manual_seed(0), dtype=truth.dtype)], 1)).Q[:, 1:]
    for d in across.T:   # and nothing beside it
        low, high = interval(d / truth.norm())
        assert low < 0 < high

BOLD = TrainingConfig(num_episodes=60, prompts_per_step=4, num_generations=16, max_completion_length=1, learning_rate=1.5e-2, lr_scheduler_type='linear')

@pytest.mark.parametrize('kind, credit', [('one turn', 'outcome'), ('two turns', 'outcome'), ('two turns', 'turn'), ('two turns', 'gae')])
def test_training_reaches_the_known_optimum(kind, credit):
    "From a policy that likes something else better."
    table, policy = TABLES[kind], policy_of(ARMS, range(ARMS))
    best = max(sum(rs) for *_, rs in outcomes(table))
    trainer = (SingleTurnGRPOTrainer if kind == 'one turn' else MultiTurnGRPOTrainer)(agent_of(policy), Bandit(table), config=replace(BOLD, turn_credit=credit), scenarios=starts(4))
    before = expected_reward(policy, table).item()
    soon(trainer.train())
    after = expected_reward(policy, table).item()
    assert before < .6 * best and after > .97 * best

# Updates written out: one row at a time, no padding, no batches, nothing skipped

END = 1

class Talk(Environment):
    "Turns of some tokens, rewards and replies that depend on them alone; some cannot be answered at all. In the scenario 'flat' nothing is worth more than anything else."
    async def reset(self, scenario, seed): self.turn, self.flat = 0, scenario.id == 'flat'; return list(scenario.messages)
    async def step(self, message):
        said = [int(w) for w in message.text.split()]
        self.turn += 1
        if sum(said) % 11 == 3 and not self.flat: raise RuntimeError('the line is dead')
        reward = 0. if self.flat else sum(said) % 5 / 4 - .3
        if sum(said) % 3 == 0: return Step(reward=reward, terminated=True)
        return await self.cut() if self.turn == 3 else Step((Message('user', f'{2 + said[0] % 4} 1'),), reward, info={'state': f'{self.turn}, {said[0] % 2}'})
    async def cut(self): return Step(reward=0. if self.flat else -.1, truncated=True)

def follows(rs, k, factor): return sum(factor ** (j - k) * rs[j] for j in range(k, len(rs)))

def left_out(t, c): return t.error or (t.truncated and not c.truncated_in_baseline)

def fined(t, c):
    "The rewards of the turns; the last one pays for the longest turn."
    rs, longest = list(t.turn_rewards), max((hi - lo for s in t.segments for lo, hi in s.turn_spans), default=0)
    if c.soft_punish_cache and longest > c.max_completion_length - c.soft_punish_cache: rs[-1] -= (longest - c.max_completion_length + c.soft_punish_cache) / c.soft_punish_cache
    return rs

def plain_anchor(group, c):
    "The outcome against the siblings', and what follows a turn against what follows those in the same state."
    alive = [t for t in group.trajectories if not t.error]
    def against(x, xs):
        m = sum(xs) / len(xs)
        spread = math.sqrt(sum((y - m) ** 2 for y in xs) / (len(xs) - 1)) if len(xs) > 1 else 0.
        return (x - m) / (spread + 1e-4 if c.scale_rewards else 1.) if spread > 1e-9 else 0.
    def at(t): return [t.info['states'][k] if 'states' in t.info else 'start' for k in range(len(t.turn_rewards))]
    same = {}
    for t in alive:
        for k, state in enumerate(at(t)): same.setdefault(state, []).append(follows(t.turn_rewards, k, c.gamma))
    whole = [sum(t.turn_rewards) for t in alive]
    return [None if t.error else [against(sum(t.turn_rewards), whole) + c.omega * against(follows(t.turn_rewards, k, c.gamma), same[state]) for k, state in enumerate(at(t))] for t in group.trajectories]

def plain_credit(group, c, groups):
    "Against the siblings: the advantage of each turn of each episode of a group, None for one that failed."
    if c.turn_credit == 'anchor': return plain_anchor(group, c)
    alive = [fined(t, c) for t in group.trajectories if not left_out(t, c)]
    if not alive: return [None] * len(group.trajectories)
    if c.turn_credit == 'outcome': worth = [[sum(rs)] for rs in alive]
    else: worth = [[follows(rs, k, c.gamma) for k in range(max(map(len, alive)))] for rs in alive]   # nothing follows the end
    means = [sum(column) / len(alive) for column in zip(*worth)]
    better = [[x - m for x, m in zip(row, means)] for row in worth]
    spread = math.sqrt(sum(b ** 2 for row in better for b in row) / (max(len(alive) - 1, 1) * len(means)))
    if c.scale_rewards == 'batch': spread = statistics.stdev(sum(fined(t, c)) for g in groups for t in g.trajectories if not left_out(t, c))
    if c.leave_one_out: better = [[x - (m * len(alive) - x) / (len(alive) - 1) for x, m in zip(row, means)] for row in worth] if len(alive) > 1 else better
    scale = spread + 1e-4 if c.scale_rewards else 1.
    advs = iter([[b / scale for b in (row * len(rs) if c.turn_credit == 'outcome' else row[:len(rs)])] for row, rs in zip(better, alive)])
    return [None if left_out(t, c) else next(advs) for t in group.trajectories]

class PlainHead:
    "What is expected of a state: a linear layer over the normalised hidden state, from zero."
    def __init__(self, size, rate):
        self.w, self.b = torch.zeros(size, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.w, self.b], rate)
    def expect(self, model, t):
        "Before each turn of an episode."
        s, = t.segments
        with torch.no_grad(): h = model.model(torch.tensor([s.ids]), use_cache=False).last_hidden_state[0, [lo - 1 for lo, _ in s.turn_spans]]
        x = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x @ self.w + self.b
    def credit(self, model, groups, c):
        "Advantages from what was expected; then ten steps towards what came."
        alive = [t for g in groups for t in g.trajectories if not t.error]
        advs = []
        for t in alive:
            v, rs = [*self.expect(model, t).tolist(), 0.], t.turn_rewards
            surprise = [r + c.gamma * v[k + 1] - v[k] for k, r in enumerate(rs)]
            advs.append([follows(surprise, k, c.gamma * c.gae_lambda) for k in range(len(rs))])
        flat = torch.tensor([a for row in advs for a in row], dtype=torch.float64)
        scale = flat.std().item() + 1e-4 if c.scale_rewards else 1.
        for _ in range(10):
            errors = torch.cat([self.expect(model, t) - torch.tensor([follows(t.turn_rewards, k, c.gamma) for k in range(len(t.turn_rewards))], dtype=torch.float64) for t in alive])
            self.adam.zero_grad(); (errors ** 2).mean().backward(); self.adam.step()
        it = iter([[a / scale for a in row] for row in advs])
        return [[None if t.error else next(it) for t in g.trajectories] for g in groups]

def plain_rows(groups, credits, c):
    "(tokens, mask, advantage of each token) of what is learnt from."
    res = []
    for g, advs in zip(groups, credits):
        for t, adv in zip(g.trajectories, advs):
            if adv is None or (t.truncated and c.mask_truncated_completions): continue
            s, = t.segments
            of = {i: a for (lo, hi), a in zip(s.turn_spans, adv, strict=True) for i in range(lo, hi)}
            assert sorted(of) == [i for i, m in enumerate(s.mask) if m]
            res.append((s.ids, s.mask, [of.get(i, 0.) for i in range(len(s.ids))]))
    return res

def plain_logps(model, ids, mask, c):
    z = (model(torch.tensor([ids]), use_cache=False).logits[0] / c.temperature).log_softmax(-1)
    return torch.stack([z[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]), torch.stack([-(z[t - 1].exp() * z[t - 1]).sum() for t in range(1, len(ids)) if mask[t]])

def plain_loss(lp, old, ref, a, c):
    "The loss of each sampled token of a row, and whether the clip stopped it."
    ratio = (lp - old).exp()
    r = (lp - old).mean().exp().expand(len(lp)) if c.importance_sampling_level == 'sequence' else ratio
    if c.loss_type == 'cispo': loss, stopped = -r.clamp(max=c.epsilon_high).detach() * a * lp, r > c.epsilon_high
    elif c.loss_type == 'sapo':
        tau = torch.where(a > 0, a.new_tensor(c.sapo_temperature_pos), c.sapo_temperature_neg)
        loss, stopped = -4 / tau / (1 + (-tau * (r - 1)).exp()) * a, torch.zeros(len(lp))
    else:
        loss = -torch.minimum((r if c.delta is None else r.clamp(max=c.delta)) * a, r.clamp(1 - c.epsilon, 1 + c.epsilon_high) * a)
        stopped = ((r < 1 - c.epsilon) & (a < 0)) | ((r > 1 + c.epsilon_high) & (a > 0))
    d = ref - lp
    return loss + c.beta * {'k1': -d * ratio, 'k2': d ** 2 / 2 * ratio.detach(), 'k3': (d.exp() - 1 - d) * ratio}[c.kl] if c.use_bias_correction_kl else loss + c.beta * {'k1': -d, 'k2': d ** 2 / 2, 'k3': d.exp() - 1 - d}[c.kl], stopped

def plain_update(model, start, head, optimizer, groups, c, rate):
    "All updates of a round; loss and length of the gradient of the last, and how often the clip stopped a token."
    credits = head.credit(model, groups, c) if c.turn_credit == 'gae' else [plain_credit(g, c, groups) for g in groups]
    rows, stopped = plain_rows(groups, credits, c), 0
    with torch.no_grad(): old, ref = ([plain_logps(m, ids, mask, c)[0] for ids, mask, _ in rows] for m in (model, start))
    tokens = sum(len(o) for o in old)
    for _ in range(c.num_iterations):
        total = 0.
        for (ids, mask, adv), o, f in zip(rows, old, ref):
            lp, entropy = plain_logps(model, ids, mask, c)
            loss, s = plain_loss(lp, o, f, torch.tensor([a for a, m in zip(adv, mask) if m], dtype=torch.float64), c)
            total = total + {**dict.fromkeys(['dapo', 'bnpo', 'cispo'], loss.sum() / tokens), 'grpo': loss.mean() / len(rows), 'sapo': loss.mean() / len(rows), 'dr_grpo': loss.sum() / len(rows) / c.max_completion_length}[c.loss_type] - c.entropy_coef * entropy.sum() / tokens
            stopped += int(s.sum())
        total.backward()
        norm = math.sqrt(sum(float((p.grad ** 2).sum()) for p in model.parameters()))
        for p in model.parameters(): p.grad *= min(1., c.max_grad_norm / (norm + 1e-6))
        optimizer.param_groups[0]['lr'] = rate
        optimizer.step(); optimizer.zero_grad()
    return total.item(), norm, stopped

ROUNDS, RATE = 3, 1e-2
USUAL = dict(num_episodes=ROUNDS, prompts_per_step=4, num_generations=5, max_completion_length=6, temperature=.8, learning_rate=RATE, num_iterations=3, max_grad_norm=.05, epsilon=.1, epsilon_high=.15)
FALLS = {'constant': [1, 1, 1], 'linear': [1, 2 / 3, 1 / 3], 'cosine': [1, .75, .25]}
WRITTEN = {
    'as it stands': {},
    'not scaled, Dr. GRPO': dict(scale_rewards=False, loss_type='dr_grpo', lr_scheduler_type='cosine'),
    'mean of rows, k3': dict(loss_type='grpo', beta=.1, micro_batch_tokens=1),
    'one batch': dict(loss_type='bnpo'),
    'k2, weighed and not clipped': dict(loss_type='cispo', epsilon_high=1.1, beta=.1, kl='k2'),
    'k1, cut talks left out': dict(beta=.1, kl='k1', mask_truncated_completions=True),
    'ratio of rows': dict(importance_sampling_level='sequence', loss_type='grpo', micro_batch_tokens=40),
    'credit of turns': dict(turn_credit='turn', gamma=.7, micro_batch_tokens=60),
    'credit of turns, not scaled': dict(turn_credit='turn', scale_rewards=False, lr_scheduler_type='linear', weight_decay=.1),
    'SAPO': dict(loss_type='sapo', sapo_temperature_pos=2., sapo_temperature_neg=3.),
    'a second clip, an entropy bonus': dict(delta=1.2, entropy_coef=.05, micro_batch_tokens=40),
    'over the spread of the batch': dict(scale_rewards='batch', beta=.1, use_bias_correction_kl=False),
    'against the others alone': dict(leave_one_out=True, loss_type='grpo'),
    'cut talks are nobodys siblings': dict(mask_truncated_completions=True, truncated_in_baseline=False),
    'long turns are fined': dict(soft_punish_cache=4),
    'turns in one state': dict(turn_credit='anchor', gamma=.9, omega=.5, micro_batch_tokens=60),
    'against a value head': dict(turn_credit='gae', gamma=.9, gae_lambda=.8, micro_batch_tokens=60)}

def side_by_side(c, eps):
    "Three rounds of the trainer, and the same updates written out: how far apart the weights end, how far they moved, the figures of both, the episodes."
    policy = policy_of(6, [END], loud=.05)
    start, model = copy.deepcopy(policy.model), copy.deepcopy(policy.model)
    trainer = MultiTurnGRPOTrainer(agent_of(policy), Talk(), config=c, scenarios=[Scenario(name, (Message('user', f'{i + 2} 1'),)) for i, name in enumerate(['a', 'b', 'c', 'flat'])])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, eps=eps, weight_decay=c.weight_decay)
    head, figures, played = PlainHead(16, c.value_learning_rate), [], []
    async def go():
        await trainer.initialize()
        trainer.optimizer.param_groups[0]['eps'] = eps
        steps = trainer.steps()
        for k in range(ROUNDS):
            groups = await trainer.play()
            played.extend(t for g in groups for t in g.trajectories)
            figures.append((plain_update(model, start, head, optimizer, groups, c, RATE * FALLS[c.lr_scheduler_type][k]), await anext(steps)))
    soon(go())
    apart, moved = (max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), other.parameters())) for other in (policy.model, start))
    return apart, moved, figures, played

@pytest.mark.parametrize('name', WRITTEN)
def test_three_rounds_are_what_is_written_out(name):
    "To the last digits, for a model in float64 is trained in float64. The value head is in float32: there AdamW, on both sides, has an eps that does not blow rounding up where a gradient is nearly 0."
    c = TrainingConfig(**USUAL | WRITTEN[name])
    eps, digits = (1e-3, 1e-6) if c.turn_credit == 'gae' else (1e-8, 1e-8)
    apart, moved, figures, played = side_by_side(c, eps)
    assert apart < digits and moved > 5e-3
    for (loss, norm, _), theirs in figures: assert abs(loss - theirs['loss']) < digits and abs(norm - theirs['grad_norm']) < 10 * digits
    assert any(t.error for t in played) and any(t.truncated for t in played) and {len(t.turn_rewards) for t in played} >= {1, 2, 3}, 'the talks have something to get wrong'
    assert (sum(s for (_, _, s), _ in figures) > 0 or c.loss_type == 'sapo') and max(norm for (_, norm, _), _ in figures) > c.max_grad_norm, 'the clip and the limit were at work'


def test_the_entropy_of_a_round_is_that_of_all_its_tokens():
    "Also of those that teach nothing, since all groups agree."
    policy = policy_of(ARMS, range(ARMS))
    trainer = SingleTurnGRPOTrainer(agent_of(policy), Bandit({(a,): (1., None) for a in range(ARMS)}), config=replace(BOLD, num_episodes=1), scenarios=starts(4))
    with torch.no_grad(): lp = policy.model(torch.tensor([[0]])).logits[0, 0].log_softmax(-1)
    async def go(): return [m async for m in trainer.steps()]
    m, = soon(go())
    assert abs(m['entropy'] - float(-(lp.exp() * lp).sum())) < 1e-6 and m['clip_ratio/region_mean'] == 0
