"""Attempts to break training: knobs that do nothing, gradients that depend on how they were cut, runs that end otherwise after a kill."""
import asyncio, copy, json, math, os, random, re, signal, threading, time
from dataclasses import fields, replace
from pathlib import Path
import numpy as np, pytest, torch
from conftest import Recorder
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
from stateset_nb.core import ConfigError, DataError, Message, NotTrained, Scenario, Segment, StateSetError, Trajectory, TrajectoryGroup
from stateset_nb.environments import ConversationEnvironment, ScriptedUser, support_desk_logs
from stateset_nb.grpo import LOSS_TYPES, grpo_loss
from stateset_nb.policy import CompactFormat, Policy, TinyConfig, load_policy, make_tokenizer, pad_rows, save_policy, tiny_policy
from stateset_nb import trainers
from stateset_nb.rewards import RewardFunction, RewardResult
from stateset_nb.trainers import (MultiTurnGRPOTrainer, Row, RunLog, SingleTurnGRPOTrainer, TrainingConfig, TrainingProfile, TrainingRun, ValueHead, backward, best_checkpoint, credit, last_checkpoint, learn, learning_rate_at, make_rows,
                                  micro_batches, pick_scenarios, turn_features)

def soon(awaitable, seconds=120):
    "Run, and fail rather than hang."
    async def go(): return await asyncio.wait_for(awaitable, seconds)
    return asyncio.run(go())

@pytest.fixture(scope='module')
def start(tmp_path_factory):
    "A policy that ends its turns now and then, so that talks have several."
    place = tmp_path_factory.mktemp('start') / 'p'
    return save_policy(tiny_policy(support_desk_logs(60, 0), 0, TinyConfig(60, 8, hidden_size=32, layers=1, max_tokens=512), cache=False), place)

class Toy(ConversationEnvironment):
    "Every turn earns something that depends on its words alone."
    played = now = most = 0
    def __init__(self): super().__init__([Scenario(f's{i}', (Message('user', q),)) for i, q in enumerate(['Where is order #4712?', 'Cancel order #1234.', 'I want a refund for order #5678.', 'Hello!'])], ScriptedUser(['Well?', 'No! Do it anyway!']))
    def spawn(self):
        new = super().spawn()
        new.top = self.top if self is not new and 'top' in vars(self) else self
        new.top.now += 1; new.top.most = max(new.top.most, new.top.now)
        return new
    async def close(self): self.top.now -= 1
    async def step(self, message):
        s = await super().step(message)
        return replace(s, reward=sum(map(ord, message.text)) % 11 / 10, info={'success': True} if s.terminated else {'success': False} if s.truncated else {'state': f'turn {self.turns}'})

class Count(RewardFunction):
    name = 'words'
    async def compute_reward(self, turns, context=None): return RewardResult(min(1, len(turns[-1].text) / 40))

BASE = TrainingConfig(num_episodes=2, prompts_per_step=2, num_generations=3, max_completion_length=10, max_turns=4, learning_rate=1e-2)

def trainer_of(start, config=BASE, out=None, cls=MultiTurnGRPOTrainer, env=None, **kw): return cls(Agent(AgentConfig('tiny'), PolicyBackend(load_policy(start, 'cpu'))), env or Toy(), Count(), config, output_dir=out, **kw)

def weights(policy): return {k: v.clone() for k, v in policy.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def no_time(m): return {k: v for k, v in m.items() if not k.startswith('time/')}

def lines(f): return [json.loads(l) for l in Path(f).read_text(encoding='utf-8').split('\n')[:-1]]

# No dead settings

FIELDS = {
    'num_episodes': 3, 'prompts_per_step': 3, 'num_generations': 4, 'max_completion_length': 5, 'max_turns': 1, 'temperature': .5, 'learning_rate': 2e-2, 'lr_scheduler_type': 'linear', 'warmup_steps': 3,
    'weight_decay': .5, 'max_grad_norm': 1e-3, 'num_iterations': 2, 'loss_type': 'grpo', 'importance_sampling_level': 'sequence', 'scale_rewards': False, 'epsilon': (1e-4, {'num_iterations': 2}),
    'epsilon_high': (1e-4, {'num_iterations': 2}), 'beta': .5, 'kl': ('k1', {'beta': .5}), 'turn_credit': 'turn', 'gamma': (.3, {'turn_credit': 'turn'}), 'gae_lambda': (.1, {'turn_credit': 'gae'}),
    'value_learning_rate': (.1, {'turn_credit': 'gae', 'num_episodes': 2}), 'mask_truncated_completions': (True, {'max_turns': 2}),
    'max_total_tokens': 12, 'filter_groups': True, 'max_num_gen_batches': (1, {'filter_groups': True}), 'leave_one_out': True, 'multi_objective_aggregation': 'normalize_then_sum', 'omega': (.1, {'turn_credit': 'anchor'}),
    'truncated_in_baseline': (False, {'mask_truncated_completions': True, 'num_generations': 8, 'max_completion_length': 40}), 'soft_punish_cache': 8, 'delta': (1.0002, {'num_iterations': 2, 'epsilon_high': 1e-4}),
    'sapo_temperature_pos': (3., {'loss_type': 'sapo', 'num_iterations': 2}), 'sapo_temperature_neg': (3., {'loss_type': 'sapo', 'num_iterations': 2}), 'entropy_coef': .1,
    'use_bias_correction_kl': (False, {'beta': .5, 'num_iterations': 2}), 'kl_target': (.01, {'beta': .5}), 'vllm_importance_sampling_correction': True,
    'vllm_importance_sampling_mode': ('token_mask', {'vllm_importance_sampling_correction': True}), 'vllm_importance_sampling_clip_max': (.5, {'vllm_importance_sampling_correction': True}),
    'vllm_importance_sampling_clip_min': (2., {'vllm_importance_sampling_correction': True}), 'metric_for_best_model': ('num_turns/mean', {'num_episodes': 4, 'save_steps': 1, 'save_total_limit': 1}),
    'greater_is_better': (False, {'num_episodes': 4, 'save_steps': 1, 'save_total_limit': 1, 'metric_for_best_model': 'num_turns/mean'}),
    'sync_ref_model': (True, {'beta': .5, 'ref_model_sync_steps': 1}), 'ref_model_sync_steps': (1, {'beta': .5, 'sync_ref_model': True}), 'ref_model_mixup_alpha': (.1, {'beta': .5, 'sync_ref_model': True, 'ref_model_sync_steps': 1}),
    'scheduling': 'eager', 'bf16': True, 'gradient_checkpointing': True, 'memory_limit': (1e-4, {'micro_batch_tokens': 0}), 'fsdp': True,
    'micro_batch_tokens': 64, 'rollout_limit': 1, 'seed': 7, 'eval_steps': 1, 'save_steps': 1, 'save_total_limit': (1, {'save_steps': 1})}

def recorded(start, config, monkeypatch, tmp_path):
    "Everything a run leaves behind that somebody could look at."
    passes, env, little, real = [], Toy(), [], trainers.keeping_little
    with monkeypatch.context() as m:
        m.setattr(trainers, 'keeping_little', lambda policy, on: (little.append(on), real(policy, on))[1])
        m.setattr(trainers, 'backward', lambda *a, **k: (passes.append(len(a[1])), backward(*a, **k))[1])
        async def ask(agent): return {'success': .5}
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        t = trainer_of(start, config, out, env=env, evaluate=ask)
        soon(t.train())
    return {'metrics': [no_time(x) for x in lines(out / 'metrics.jsonl')], 'trajectories': lines(out / 'trajectories.jsonl'), 'files': sorted(str(p.relative_to(out)) for p in out.rglob('*')), 'passes': passes, 'in flight': env.most, 'little': little, 'scheduling': t.policy.scheduling,
            'weights': {k: v.double().sum().item() for k, v in t.policy.model.state_dict().items()}}

def test_every_setting_changes_what_is_recorded(start, monkeypatch, tmp_path):
    assert set(FIELDS) == {f.name for f in fields(TrainingConfig)}, 'a new setting needs a line here'
    seen = {}
    def run(config):
        if config not in seen: seen[config] = recorded(start, config, monkeypatch, tmp_path)
        return seen[config]
    assert recorded(start, BASE, monkeypatch, tmp_path) == run(BASE), 'the same settings, the same record'
    for name, v in FIELDS.items():
        value, base = v if isinstance(v, tuple) else (v, {})
        was = replace(BASE, **base)
        if name == 'fsdp':
            with pytest.raises(ConfigError, match='torchrun'): run(replace(was, fsdp=True))
            continue
        assert run(replace(was, **{name: value})) != run(was), f'{name} changes nothing'

def test_cispo_wants_a_ceiling_of_at_least_one():
    with pytest.raises(ConfigError, match='try epsilon_high=5'): TrainingConfig(loss_type='cispo')
    assert TrainingConfig(loss_type='cispo', epsilon_high=5.).loss_type == 'cispo'

BAD = {'num_episodes': [0, 1.5, 2.0, math.inf, math.nan, True, '3'], 'prompts_per_step': [0], 'num_generations': [1, 2.5], 'max_completion_length': [0], 'max_turns': [0], 'temperature': [0, -1, math.inf, math.nan], 'learning_rate': [0, math.nan, math.inf, '1e-5'],
       'lr_scheduler_type': ['Linear', None], 'warmup_steps': [-1, .5], 'weight_decay': [-1, math.nan], 'max_grad_norm': [0, math.inf], 'num_iterations': [0], 'loss_type': ['ppo'], 'importance_sampling_level': ['turn'], 'scale_rewards': ['no', None],
       'epsilon': [0], 'epsilon_high': [0], 'beta': [-.1], 'kl': ['k4'], 'turn_credit': ['token'], 'gamma': [-.1, 1.1, math.nan], 'gae_lambda': [-.1, 1.1], 'value_learning_rate': [0], 'mask_truncated_completions': ['false'], 'micro_batch_tokens': [-1, .5], 'memory_limit': [-1, 1.], 'scheduling': ['fast'], 'bf16': ['yes'], 'gradient_checkpointing': [None], 'fsdp': ['yes'], 'sync_ref_model': ['yes', True], 'ref_model_sync_steps': [0], 'ref_model_mixup_alpha': [-.1, 1.1], 'rollout_limit': [0], 'seed': [-1, .5], 'eval_steps': [-1],
       'save_steps': [-1], 'save_total_limit': [0], 'max_total_tokens': [-1, 1.5], 'filter_groups': ['yes', None], 'max_num_gen_batches': [0], 'leave_one_out': ['yes'], 'multi_objective_aggregation': ['sum', None], 'omega': [-1],
       'truncated_in_baseline': ['no', False], 'soft_punish_cache': [-1, .5, 129], 'delta': [0, 1., 1.28, math.nan, math.inf, True, '2'], 'sapo_temperature_pos': [0, math.nan], 'sapo_temperature_neg': [-1], 'entropy_coef': [-.1, math.inf],
       'use_bias_correction_kl': ['yes'], 'kl_target': [-1, .1, math.nan], 'vllm_importance_sampling_correction': [None], 'vllm_importance_sampling_mode': ['token'], 'vllm_importance_sampling_clip_max': [0, -1, None],
       'vllm_importance_sampling_clip_min': [0, 3., 4], 'metric_for_best_model': [1, 'eval/success'], 'greater_is_better': [None]}

TOGETHER = [(dict(delta=2., loss_type='sapo'), 'delta'), (dict(delta=2., loss_type='cispo', epsilon_high=5.), 'delta'), (dict(turn_credit='anchor', scale_rewards='batch'), 'states are compared within a group'),
            (dict(turn_credit='turn', leave_one_out=True), 'leave_one_out'), (dict(turn_credit='gae', filter_groups=True), 'filter_groups'), (dict(multi_objective_aggregation='normalize_then_sum', turn_credit='turn'), 'normalize_then_sum'),
            (dict(multi_objective_aggregation='normalize_then_sum', scale_rewards=False), 'normalize_then_sum'), (dict(multi_objective_aggregation='normalize_then_sum', leave_one_out=True), 'normalize_then_sum')]

@pytest.mark.parametrize('kw, said', TOGETHER)
def test_settings_that_contradict_each_other_are_refused(kw, said):
    with pytest.raises(ConfigError, match=said): TrainingConfig(**kw)

def test_settings_out_of_range_are_refused_by_name():
    assert set(BAD) == set(FIELDS)
    for k, vs in BAD.items():
        for v in vs:
            with pytest.raises(ConfigError, match=k): TrainingConfig(**{k: v})
    for p in TrainingProfile: assert TrainingConfig.from_dict(json.loads(json.dumps(TrainingConfig.from_profile(p).to_dict()))) == TrainingConfig.from_profile(p)
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"): TrainingConfig.from_profile(TrainingProfile.TINY, learning_rat=1)

# Learning

@pytest.fixture(scope='module')
def round_(start):
    "The episodes of one round: four groups of four."
    t = trainer_of(start, replace(BASE, prompts_per_step=4, num_generations=4))
    soon(t.initialize())
    groups = soon(t.play())
    assert len({len(x.turn_rewards) for g in groups for x in g.trajectories}) > 1
    return groups

def gradient(start, groups, config, rows=None, old=False):
    "The whole gradient of a round, as `learn` would gather it."
    p = load_policy(start, 'cpu')
    p.model.train()
    rows = rows if rows is not None else [r for r in make_rows(groups, config) if any(r.mask)]
    every = [r for r in make_rows(groups, config) if any(r.mask)]
    ref = load_policy(start, 'cpu') if config.beta else None
    for b in micro_batches(rows, config.micro_batch_tokens):
        backward(p, b, [torch.tensor(r.logps) + .05 for r in b] if old else None, ref, config, len(every), sum(sum(r.mask) for r in every))
    return torch.cat([q.grad.flatten() if q.grad is not None else torch.zeros(q.numel()) for q in p.model.parameters()])

def check_close(a, b, rel=1e-6): assert ((a - b).norm() / b.norm()).item() <= rel, ((a - b).norm() / b.norm()).item()

@pytest.mark.parametrize('config', [BASE, replace(BASE, loss_type='grpo'), replace(BASE, loss_type='dr_grpo'), replace(BASE, importance_sampling_level='sequence', loss_type='grpo'), replace(BASE, beta=.1),
                                    replace(BASE, turn_credit='turn', gamma=.5), replace(BASE, mask_truncated_completions=True)], ids=lambda c: f'{c.loss_type}-{c.importance_sampling_level}-{c.beta}-{c.turn_credit}')
def test_the_gradient_does_not_depend_on_how_it_was_cut(start, round_, config):
    config = replace(config, micro_batch_tokens=10**6)
    whole = gradient(start, round_, config, old=True)
    for n in (1, 100, 400): check_close(gradient(start, round_, replace(config, micro_batch_tokens=n), old=True), whole, 1e-6)

TK = make_tokenizer(['Where is order #4712? It is on its way.'])

def a_model(name):
    import transformers as tf
    torch.manual_seed(0)
    c = dict(vocab_size=len(TK), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    m = {'llama': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**c)), 'qwen3': lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**c, head_dim=8)), 'gpt2': lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=len(TK), n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=1))}[name]()
    return m.double()

@pytest.mark.parametrize('name', ['llama', 'qwen3', 'gpt2'])
@pytest.mark.parametrize('kw', [dict(loss_type=k, epsilon_high=5. if k == 'cispo' else .28) for k in LOSS_TYPES] + [dict(loss_type='grpo', importance_sampling_level='sequence'), dict(beta=.1), dict(entropy_coef=.05)], ids=lambda kw: '-'.join(map(str, kw.values())))
def test_every_model_learns_by_the_gradient_of_plain_rows(name, kw):
    "A tree of siblings in micro-batches of any size, against one padded pass of the Hugging Face model; dropout (GPT-2 has some) stays off."
    config = replace(BASE, num_iterations=2, **kw)
    policy, rng = Policy(a_model(name), TK, CompactFormat(TK)), np.random.default_rng(0)
    rows = []
    for _ in range(2):
        prompt = rng.integers(5, len(TK), 80).tolist()
        for g in range(4):
            n = int(rng.integers(5, 30))
            mask = [0] * 80 + rng.integers(0, 2, n - 1).tolist() + [1]
            rows.append(Row((*prompt, *rng.integers(5, len(TK), n).tolist()), tuple(mask), (0.,) * (80 + n), tuple(float(m) * (g - 1.5) for m in mask)))
    old = {id(r): torch.from_numpy(rng.normal(-5.7, .3, len(r.ids))) for r in rows}
    n = sum(sum(r.mask) for r in rows)
    ref = Policy(copy.deepcopy(policy.model), TK, CompactFormat(TK)) if config.beta else None
    def grads(): return torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    def tree(size):
        policy.model.zero_grad()
        for b in micro_batches(rows, size): backward(policy, b, [old[id(r)] for r in b], ref, config, len(rows), n)
        return grads()
    def plain():
        policy.model.zero_grad()
        ids, mask, adv = pad_rows([r.ids for r in rows]), pad_rows([r.mask for r in rows]), pad_rows([r.advantages for r in rows], dtype=torch.float64)
        z = policy.model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        lp = torch.cat([torch.zeros(len(ids), 1), z.gather(-1, ids[:, 1:, None]).squeeze(-1)], 1)
        h = torch.cat([torch.zeros(len(ids), 1), -(z.exp() * z).sum(-1)], 1)
        if config.importance_sampling_level == 'sequence': adv = adv.sum(-1) / mask.sum(-1)
        loss, _ = grpo_loss(lp, torch.nn.utils.rnn.pad_sequence([old[id(r)] for r in rows], batch_first=True), lp.detach() if ref else None, adv, mask, n_sequences=len(rows), n_tokens=n, entropy=h if config.entropy_coef else None, **trainers._loss_settings(config))
        loss.backward()
        return grads()
    whole = plain()
    for size in (10**6, *([] if config.loss_type == 'bnpo' else (300, 1))): check_close(tree(size), whole, 1e-6)

def test_rows_without_an_advantage_teach_nothing(start, round_):
    flat = [replace(g, trajectories=tuple(replace(t, turn_rewards=(.5,) + (0.,) * (len(t.turn_rewards) - 1)) for t in g.trajectories)) if i % 2 else g for i, g in enumerate(round_)]
    rows = [r for r in make_rows(flat, BASE) if any(r.mask)]
    todo = [r for r in rows if any(r.advantages)]
    assert 0 < len(todo) < len(rows)
    check_close(gradient(start, flat, BASE, todo), gradient(start, flat, BASE, rows), 1e-6)
    p, q = load_policy(start, 'cpu'), load_policy(start, 'cpu')
    seen, grads = [0, 0], []
    for i, (pol, rows_) in enumerate(((p, None), (q, rows))):
        opt = Recorder(pol.model, 1e-3)
        grads.append(opt.grads)
        if rows_ is None: learn(pol, None, opt, flat, BASE)
        else:
            pol.model.train()
            for b in micro_batches(rows_, BASE.micro_batch_tokens): backward(pol, b, None, None, BASE, len(rows), sum(sum(r.mask) for r in rows)); seen[i] += 1
            trainers._move(pol, opt, learning_rate_at(0, BASE), BASE.max_grad_norm)
    (a,), (b,) = grads
    assert (a - b).abs().max() < 1e-6 * b.abs().max()

def shaped(groups, f): return [replace(g, trajectories=tuple(f(t, i, j) for j, t in enumerate(g.trajectories))) for i, g in enumerate(groups)]
def worth(t, r, error=None): return replace(t, turn_rewards=(r,) + (0.,) * (len(t.turn_rewards) - 1), error=error)

@pytest.mark.parametrize('r', [0., .9, .1, 1e6, -3.3])
@pytest.mark.parametrize('credit_', ['outcome', 'turn'])
def test_equal_rewards_move_nothing(start, round_, r, credit_):
    p = load_policy(start, 'cpu')
    was, opt = weights(p), torch.optim.AdamW(p.model.parameters(), 1e-2, weight_decay=0)
    m = learn(p, None, opt, shaped(round_, lambda t, i, j: worth(t, r)), replace(BASE, turn_credit=credit_))
    assert same(weights(p), was) and m['loss'] == m['grad_norm'] == 0
    assert all(not s['exp_avg'].any() and not s['exp_avg_sq'].any() for s in opt.state.values()) and p.version == load_policy(start, 'cpu').version + 1

def test_failed_episodes_are_left_out_of_everything(start, round_):
    bad = shaped(round_, lambda t, i, j: worth(t, 1e9, 'TimeoutError: x') if j == 2 else t)
    without = [replace(g, trajectories=tuple(t for j, t in enumerate(g.trajectories) if j != 2)) for g in round_]
    for config in (BASE, replace(BASE, turn_credit='turn'), replace(BASE, beta=.1, loss_type='grpo')):
        check_close(gradient(start, bad, config), gradient(start, without, config), 1e-6)
        assert [[a.tolist() for j, a in enumerate(g) if j != 2] for g in credit(bad, config)] == [[a.tolist() for a in g] for g in credit(without, config)]
        assert not any(a.any() for g in credit(bad, config) for a in g[2:3])
    m = trainers.play_metrics(bad)
    assert m['error_rate'] == .25 and m['reward'] < 100
    lone = shaped(round_, lambda t, i, j: t if j == 0 else worth(t, 1., 'x'))
    assert not gradient(start, lone, BASE).any(), 'one alone has nobody to be compared with'

def test_turns_are_credited_with_what_follows_them():
    def t(*r): return Trajectory('t', 's', 0, turn_rewards=r)
    g = [TrajectoryGroup('s', (t(0., 1., 0.), t(0.,), t(1., 1.)))]
    c = TrainingConfig(turn_credit='turn', gamma=.5, scale_rewards=False)
    togo = [[.5, 1., 0.], [0., 0., 0.], [1.5, 1., 0.]]
    mean = [sum(x[k] for x in togo) / 3 for k in range(3)]
    got = [a.tolist() for a in credit(g, c)[0]]
    assert [len(a) for a in got] == [3, 1, 2]
    for a, x in zip(got, togo): assert a == pytest.approx([x[k] - mean[k] for k in range(len(a))])
    assert [a.tolist() for a in credit(g, replace(c, turn_credit='outcome'))[0]] == [pytest.approx([1 - 1, 0., 0.]), pytest.approx([-1.]), pytest.approx([1., 1.])]

def test_an_episode_left_out_of_the_baseline_is_as_if_it_had_not_been_played(round_):
    c = replace(BASE, mask_truncated_completions=True, truncated_in_baseline=False)
    cut = shaped(round_, lambda t, i, j: replace(worth(t, 50.), truncated=True) if j == 1 else replace(t, truncated=False))
    without = [replace(g, trajectories=tuple(t for j, t in enumerate(g.trajectories) if j != 1)) for g in cut]
    for kw in ({}, {'turn_credit': 'turn'}, {'leave_one_out': True}, {'scale_rewards': 'batch'}, {'multi_objective_aggregation': 'normalize_then_sum'}):
        a, b = credit(cut, replace(c, **kw)), credit(without, replace(c, **kw))
        for g, h in zip(a, b):
            assert not g[1].any()
            assert all(torch.allclose(x, y) for x, y in zip([x for j, x in enumerate(g) if j != 1], h, strict=True))

def test_the_parts_of_a_reward_are_compared_one_by_one():
    from stateset_nb.grpo import gdpo_advantages
    c = TrainingConfig(multi_objective_aggregation='normalize_then_sum')
    def t(info=None, error=None, **parts): return Trajectory('t', 's', 0, turn_rewards=(sum(parts.values()),), components=parts, info=info or {}, error=error)
    def got(*ts, c=c): return [float(a[0]) for a in credit([TrajectoryGroup('s', ts)], c)[0]]
    rows = [t(a=0., b=.1), t(a=1., b=.2), t(a=0.), t(a=1., b=0.)]
    assert got(*rows) == pytest.approx(gdpo_advantages(torch.tensor([[[0., .1], [1., .2], [0., math.nan], [1., 0.]]], dtype=torch.float64))[0].tolist())
    assert got(t(a=0., b=.1), t(error='lost', a=9., b=9.), *rows[2:])[1] == 0
    assert got(*(t(error='lost') for _ in range(4))) == [0.] * 4
    plain = [Trajectory('t', 's', 0, turn_rewards=(r,)) for r in (0., 1., 0., 0.)]
    assert got(*plain) == pytest.approx(got(*(replace(x, components={'only': x.reward}) for x in plain))), 'a reward without parts is one'
    listed = {'rewards': {'environment': [1., 1.], 'a': [0., 0.]}}
    assert got(t(listed, whole=1.), t({'rewards': {'environment': [0., 1.], 'a': [1., 0.]}}, whole=5.))[0] > 0, 'what the episode lists, with its weights'

def test_the_parts_that_are_played_add_up_to_the_reward(start):
    from stateset_nb.rewards import CompositeReward
    class Short(Count): name = 'short'
    mix = CompositeReward([Count(), Short()], {'words': 3., 'short': 1.})
    for reward, names in ((Count(), {'environment', 'words'}), (mix, {'environment', 'words', 'short'})):
        tr = MultiTurnGRPOTrainer(Agent(AgentConfig('tiny'), PolicyBackend(load_policy(start, 'cpu'))), Toy(), reward, BASE)
        soon(tr.initialize())
        for g in soon(tr.play()):
            for x in g.trajectories:
                assert x.info['rewards'].keys() == names and sum(v * w for v, w in x.info['rewards'].values()) == pytest.approx(x.reward)
    gated = CompositeReward([Count(), Short()], gates=('short',))
    with pytest.raises(ConfigError, match='a gate multiplies'): MultiTurnGRPOTrainer(Agent(AgentConfig('stub')), Toy(), gated, replace(BASE, multi_objective_aggregation='normalize_then_sum'))

def test_states_must_be_said(start, round_):
    c = replace(BASE, turn_credit='anchor')
    assert all('states' in t.info for g in round_ for t in g.trajectories if len(t.turn_rewards) > 1) and any(a.any() for g in credit(round_, c) for a in g)
    mute = shaped(round_, lambda t, i, j: replace(t, info={}))
    with pytest.raises(ConfigError, match='Step.info'): credit(mute, c)
    assert credit([replace(g, trajectories=tuple(t for t in g.trajectories if len(t.turn_rewards) == 1)[:2]) for g in mute if sum(len(t.turn_rewards) == 1 for t in g.trajectories) > 1], c) is not None

def test_a_long_turn_pays_with_the_last_and_the_log_keeps_the_outcome(round_):
    c = replace(BASE, soft_punish_cache=BASE.max_completion_length)
    longest = {id(t): max(hi - lo for s in t.segments for lo, hi in s.turn_spans) for g in round_ for t in g.trajectories}
    fine = {k: -n / BASE.max_completion_length for k, n in longest.items()}
    paid = shaped(round_, lambda t, i, j: replace(t, turn_rewards=(*t.turn_rewards[:-1], t.turn_rewards[-1] + fine[id(t)])))
    for kw in ({}, {'turn_credit': 'turn'}):
        assert all(torch.allclose(a, b, atol=1e-5) for g, h in zip(credit(round_, replace(c, **kw)), credit(paid, replace(BASE, **kw))) for a, b in zip(g, h))
    m = trainers.play_metrics(round_, c)
    assert m['reward'] == trainers.play_metrics(round_)['reward'] and m['completions/overlong_punishment'] == pytest.approx(sum(fine.values()) / len(fine))

# Dynamic sampling

class Lucky(Toy):
    "Only some scenarios can be won or lost."
    def __init__(self, n=12): super().__init__(); self.scenarios = [Scenario(f'{"hard" if i % 3 else "even"}-{i}', (Message('user', f'Where is order #{1000 + i}?'),)) for i in range(n)]
    async def step(self, message): return replace(await super().step(message), info={'success': sum(map(ord, message.text)) % 2 == 0} if 'even' in self.scenario.id else {'success': False}, terminated=True)

def test_dynamic_sampling_plays_on_until_enough_groups_disagree(start, tmp_path):
    c = replace(BASE, num_episodes=3, num_generations=4, filter_groups=True, max_num_gen_batches=6)
    t = trainer_of(start, c, tmp_path / 'r', env=Lucky())
    learnt, learn_ = [], trainers.learn
    with pytest.MonkeyPatch.context() as m:
        m.setattr(trainers, 'learn', lambda p, r, o, groups, *a: (learnt.append(groups), learn_(p, r, o, groups, *a))[1])
        soon(t.train())
    rows = lines(tmp_path / 'r' / 'metrics.jsonl')
    played = [[x['scenario_id'] for x in lines(tmp_path / 'r' / 'trajectories.jsonl') if x['step'] == k + 1] for k in range(3)]
    for k, (m, groups) in enumerate(zip(rows, learnt)):
        assert m['dynamic_sampling/played'] == len(played[k]) == len(set(played[k])) <= 12 and m['dynamic_sampling/kept'] == len(groups) <= 2
        assert all(g.scenario_id.startswith('even') and len({x.info['success'] for x in g.trajectories}) == 2 for g in groups)
        assert [g.scenario_id for g in groups] == [s for s in played[k] if s in {g.scenario_id for g in groups}], 'in the order of asking'
        assert len(groups) == 2 or len(played[k]) == 12, 'it ends when there are enough, or no more'
    assert any(len(p) > 2 for p in played)

def test_a_round_in_which_all_groups_agree_teaches_nothing_and_is_no_error(start):
    class Same(Toy):
        async def step(self, message): return replace(await super().step(message), info={'success': True}, terminated=True)
        async def cut(self): return replace(await super().cut(), info={'success': True})
    t = trainer_of(start, replace(BASE, filter_groups=True, num_episodes=1, beta=.1, kl_target=.1), env=Same())
    was = load_policy(start, 'cpu').model.state_dict()
    async def go(): return [m async for m in t.steps()]
    m, = soon(go())
    assert m['dynamic_sampling/kept'] == 0 and m['dynamic_sampling/played'] == 4 and m['loss'] == m['grad_norm'] == 0 and m['beta'] == .1 and 'kl' not in m
    assert same(weights(t.policy), was)

# Another engine

def test_tokens_of_another_engine_are_weighed(start, round_):
    c = replace(BASE, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode='token_truncate', vllm_importance_sampling_clip_max=2.)
    rows = [r for r in make_rows(round_, BASE) if any(r.mask)]
    def off(d): return [replace(r, logps=tuple(lp - d * m for lp, m in zip(r.logps, r.mask))) for r in rows]
    plain = gradient(start, round_, BASE, rows)
    check_close(gradient(start, round_, c, off(0.)), plain, 1e-4)
    check_close(gradient(start, round_, c, off(math.log(1.5))), 1.5 * plain, 1e-4)
    check_close(gradient(start, round_, c, off(5.)), 2 * plain, 1e-4)
    check_close(gradient(start, round_, c, off(math.nan)), plain, 1e-4)   # an engine that does not say
    assert not gradient(start, round_, replace(c, vllm_importance_sampling_mode='sequence_mask'), off(5.)).any()

# The distance, steered

def test_beta_follows_the_distance_and_a_knob_sets_it_anew(start, tmp_path):
    c = replace(BASE, num_episodes=4, beta=.1, kl_target=1e-6, num_iterations=2)
    t = trainer_of(start, c, tmp_path / 'r')
    async def go():
        k = 0
        async for _ in t.steps():
            k += 1
            if k == 2: t.run.set_knob('beta', .5)
    soon(go())
    rows = [m['beta'] for m in lines(tmp_path / 'r' / 'metrics.jsonl')]
    assert rows == pytest.approx([.102, .102 * 1.02, .51, .51 * 1.02]), 'far above the target: 2 % a round'
    with pytest.raises(ConfigError, match='above 0'): t.run.set_knob('beta', 0)
    again = trainer_of(start, c)
    soon(again.load_checkpoint(tmp_path / 'r' / 'checkpoint-4'))
    assert again.settings.beta == rows[-1] and again.config.beta == .1

# What is logged

NAMES = [BASE, replace(BASE, loss_type='cispo', epsilon_high=5.), replace(BASE, loss_type='sapo', turn_credit='gae'), replace(BASE, beta=.1, kl_target=.1, eval_steps=1), replace(BASE, filter_groups=True),
         replace(BASE, vllm_importance_sampling_correction=True, soft_punish_cache=4, entropy_coef=.1)]

def test_every_metric_is_in_the_table(start, root):
    from fnmatch import fnmatchcase
    page = ''.join(''.join(c['source']) + '\n' for c in json.loads((root / 'nbs' / '32_trainers.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    table = [n for row in re.findall(r'^\| (`.*?) \|.*\|.*\|.*\|$', page, re.M) for n in re.findall(r'`([^`]+)`', row)]
    assert len(table) == len(set(table)) > 30
    seen = set()
    async def ask(agent): return {'success': .5}
    for c in NAMES:
        t = trainer_of(start, replace(c, num_episodes=2), evaluate=ask)
        t.run.set_knob('temperature', .9)
        async def go(t=t): return [m async for m in t.steps()]
        seen |= {k for m in soon(go()) for k in m}
    assert not (strange := {k for k in seen if sum(fnmatchcase(k, n) for n in table) != 1}), strange
    assert not (never := [n for n in table if not any(fnmatchcase(k, n) for k in seen)]), never

# A value head

def test_a_head_sees_each_turn_before_it_is_said(start, round_):
    p = load_policy(start, 'cpu')
    ts = [t for g in round_ for t in g.trajectories]
    assert max(len(t.turn_rewards) for t in ts) > 1
    for few in (64, 10**6):
        for t, f in zip(ts, turn_features(p, ts, few)):
            assert len(f) == len(t.turn_rewards) == sum(len(s.turn_spans) for s in t.segments)
            at = iter(f)
            for s in t.segments:
                for lo, _ in s.turn_spans:
                    with torch.no_grad(): alone = p.model.base_model(torch.tensor([s.ids[:lo]])).last_hidden_state[0, -1]  # nothing of the turn itself
                    assert torch.allclose(next(at), alone, atol=1e-5)

def test_a_head_never_moves_the_policy_and_asks_before_it_learns(start, round_):
    p, c = load_policy(start, 'cpu'), replace(BASE, turn_credit='gae', learning_rate=1e-9)
    head = ValueHead(32)
    was = weights(p)
    learn(p, None, torch.optim.SGD(p.model.parameters(), 0.), shaped(round_, lambda t, i, j: worth(t, 0.)), c, head=head)
    assert same(weights(p), was) and all(q.grad is None for q in p.model.parameters())
    assert not any(w.any() for w in head.layer.parameters()), 'nothing was earned, and nothing was expected'
    values, seen = trainers._learn_values(p, head, round_, c)
    assert not any(v.any() for v in values) and any(w.any() for w in head.layer.parameters()) and seen['value/explained_variance'] <= 0

def test_failed_episodes_teach_a_head_nothing(start, round_):
    heads = [ValueHead(32), ValueHead(32)]
    bad = shaped(round_, lambda t, i, j: worth(t, 1e9, 'TimeoutError: x') if j == 2 else t)
    without = [replace(g, trajectories=tuple(t for j, t in enumerate(g.trajectories) if j != 2)) for g in round_]
    c, p = replace(BASE, turn_credit='gae'), load_policy(start, 'cpu')
    for h, gs in zip(heads, (bad, without)): trainers._learn_values(p, h, gs, c)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(heads[0].layer.parameters(), heads[1].layer.parameters()))
    none = [torch.zeros(len(t.turn_rewards)) for g in bad for t in g.trajectories]
    assert not any(a[2].any() for a in credit(bad, c, none))

def test_a_head_makes_advantages_of_its_surprise():
    def t(*r): return Trajectory('t', 's', 0, turn_rewards=r)
    g, values = [TrajectoryGroup('s', (t(0., 1., 0.), t(2.,)))], [torch.tensor([.5, .25, .125]), torch.tensor([1.])]
    c = TrainingConfig(turn_credit='gae', gamma=.5, gae_lambda=.5, scale_rewards=False)
    d = [0 + .5 * .25 - .5, 1 + .5 * .125 - .25, 0 - .125]  # reward, plus what is expected next, minus what was expected
    assert [a.tolist() for a in credit(g, c, values)[0]] == [pytest.approx([d[0] + .25 * d[1] + .0625 * d[2], d[1] + .25 * d[2], d[2]]), pytest.approx([1.])]

def test_masks_and_spans_carry_the_advantage_of_their_turn():
    s = Segment((1, 2, 3, 4, 5, 6), (0, 1, 1, 0, 0, 1), (0., -1., -1., 0., 0., -1.), ((1, 3), (5, 6)))
    fork = Segment((7, 8), (0, 1), (0., -1.), ((1, 2),), 0)
    a = Trajectory('a', 's', 0, segments=(s, fork), turn_rewards=(1., 0., 2.))
    b = Trajectory('b', 's', 0, segments=(s,), turn_rewards=(0., 0.), truncated=True)
    rows = make_rows([TrajectoryGroup('s', (a, b))], TrainingConfig(turn_credit='turn', scale_rewards=False, mask_truncated_completions=True))
    assert rows[0].advantages == (0, 1.5, 1.5, 0, 0, 1.) and rows[1].advantages == (0, 1.) and rows[2].mask == (0,) * 6

def test_the_reference_pulls_back_and_stays(start, round_):
    c = replace(BASE, beta=.5, learning_rate=1e-2, weight_decay=0.)
    p, ref = load_policy(start, 'cpu'), load_policy(start, 'cpu')
    opt, was = torch.optim.AdamW(p.model.parameters(), 1e-2, weight_decay=0), weights(ref)
    first = learn(p, ref, opt, round_, c)
    second = learn(p, ref, opt, round_, c)
    assert abs(first['kl']) < 1e-6 and second['kl'] > 1e-3 and same(weights(ref), was)
    flat = shaped(round_, lambda t, i, j: worth(t, .5))
    kls = [learn(p, ref, opt, flat, c)['kl'] for _ in range(6)]
    assert kls[-1] < kls[0], 'where nobody is better, only the reference speaks'
    alone = [learn(q, None, o, round_, replace(c, beta=0.)) for q in [load_policy(start, 'cpu')] for o in [torch.optim.AdamW(q.model.parameters(), 1e-2)]]
    assert 'kl' not in alone[0] or math.isfinite(alone[0]['kl'])

def test_the_second_update_on_the_same_episodes_knows_the_first(start, round_):
    c = replace(BASE, num_iterations=2, learning_rate=3e-2, epsilon=.05, epsilon_high=.05)
    p = load_policy(start, 'cpu')
    m = learn(p, None, torch.optim.AdamW(p.model.parameters(), 3e-2, weight_decay=0), round_, c)
    one = load_policy(start, 'cpu')
    first = learn(one, None, torch.optim.AdamW(one.model.parameters(), 3e-2, weight_decay=0), round_, replace(c, num_iterations=1))
    clip = next(k for k in m if 'clip_ratio' in k and 'mean' in k or k == 'clip_ratio')
    assert m[clip] > 0 == first[clip]
    rows = [r for r in make_rows(round_, c) if any(r.mask) and any(r.advantages)]
    n = [r for r in make_rows(round_, c) if any(r.mask)]
    old = []
    base = load_policy(start, 'cpu'); base.model.train()
    with torch.no_grad():
        for b in micro_batches(rows, 8192): old += [lp for lp in trainers.sequence_logps(base, trainers.pad_rows([r.ids for r in b]), trainers.pad_rows([r.mask for r in b]))[0]]
    one.model.train(); total = 0.
    i = 0
    for b in micro_batches(rows, 8192):
        loss, _, _ = backward(one, b, [o[:len(r.ids)] for o, r in zip(old[i:], b)], None, c, len(n), sum(sum(r.mask) for r in n))
        total += loss; i += len(b)
    assert m['loss'] == pytest.approx(total, rel=1e-4, abs=1e-7)

@pytest.mark.parametrize('breaks', ['weights', 'gradient'])
def test_a_loss_that_is_no_number_stops_the_run_and_says_so(start, tmp_path, breaks):
    t, events = trainer_of(start, out=tmp_path / 'r'), []
    t.run.listeners.append(lambda state, more: events.append((state, more)))
    async def go():
        async for _ in t.steps():
            if breaks == 'gradient': next(iter(t.policy.model.parameters())).register_hook(lambda g: g * math.inf)
            else:
                with torch.no_grad(): t.policy.model.lm_head.weight[0, 0] = math.nan
            t.policy.updated()
    with pytest.raises(StateSetError, match='not finite|the loss is|gradient is|every one of'): soon(go())
    (_, more), (last, _) = events[-2:]
    assert t.run.state == events[-2][0] == 'stopped' and more['reason'] and last == 'ended'

def test_every_episode_failing_stops_the_run(start):
    class Fails(Toy):
        async def reset(self, scenario, seed): raise TimeoutError('nobody there')
    t = trainer_of(start, env=Fails())
    with pytest.raises(StateSetError, match='nobody there'): soon(t.train())
    assert t.run.state == 'stopped'

def test_scenarios_come_once_before_any_comes_twice():
    many = [Scenario(f's{i}') for i in range(7)]
    c = TrainingConfig(prompts_per_step=3, seed=4)
    drawn = [s.id for step in range(7) for s in pick_scenarios(many, step, c)]
    assert all(sorted(drawn[i:i + 7]) == sorted(s.id for s in many) for i in range(0, 21, 7)) or len(drawn) < 21
    assert pick_scenarios(many, 5, c) == pick_scenarios(many, 5, c) != pick_scenarios(many, 5, replace(c, seed=5))
    assert len(pick_scenarios(many[:2], 0, c)) == 2

def test_learning_rates_rise_and_fall():
    c = TrainingConfig(num_episodes=10, learning_rate=1., warmup_steps=4)
    assert [learning_rate_at(i, c) for i in range(5)] == [.25, .5, .75, 1, 1]
    for kind in ('linear', 'cosine'):
        r = [learning_rate_at(i, replace(c, warmup_steps=0, lr_scheduler_type=kind)) for i in range(10)]
        assert r[0] == 1 and r == sorted(r, reverse=True) and 0 < r[-1] <= .1

# The handle

class Watched(TrainingRun):
    "Says when the trainer waits at its gate."
    def __init__(self): super().__init__(); self.waits = threading.Event()
    async def gate(self, step=None):
        if self.state == 'paused': self.waits.set()
        return await super().gate(step)

class Log:
    "A callback that lets other threads follow."
    def __init__(self): self.rows, self.came = [], threading.Condition()
    def on_log(self, step, metrics):
        with self.came: self.rows.append((step, metrics)); self.came.notify_all()
    def wait(self, n):
        with self.came: assert self.came.wait_for(lambda: len(self.rows) >= n, 60)

def test_a_run_is_led_from_another_thread(start, tmp_path):
    run, log, events = Watched(), Log(), []
    run.listeners.append(lambda event, more: events.append(event) if event in ('running', 'paused', 'stopped', 'done') else None)
    t = trainer_of(start, replace(BASE, num_episodes=10_000, learning_rate=1e-4), tmp_path / 'r', run=run, callbacks=[log])
    th = threading.Thread(target=lambda: asyncio.run(t.train()))
    th.start()
    try:
        log.wait(1)
        run.pause('look')
        assert run.waits.wait(60)
        n = len(log.rows)
        time.sleep(.1)
        assert len(log.rows) == n and run.state == 'paused'
        run.set_knob('learning_rate', 7e-4); run.set_knob('temperature', .5)
        for bad in (('learning_rate', -1), ('learning_rate', math.inf), ('learning_rate', math.nan), ('learning_rate', '1'), ('temperature', True), ('beta', .1), ('seed', 1)):
            with pytest.raises(ConfigError): run.set_knob(*bad)
        run.resume()
        log.wait(n + 2)
    finally:
        run.stop('enough')
        th.join(60)
    assert not th.is_alive() and events[0] == 'running' and events[1:4] == ['paused', 'running', 'stopped']
    step, m = log.rows[n]
    assert m['knobs/learning_rate'] == m['learning_rate'] == 7e-4 and m['knobs/temperature'] == .5 and 'knobs/temperature' not in log.rows[n + 1][1] and log.rows[n + 1][1]['learning_rate'] == 7e-4
    assert [s for s, _ in log.rows] == list(range(1, len(log.rows) + 1)) == [r['step'] for r in lines(tmp_path / 'r' / 'metrics.jsonl')]
    saved = last_checkpoint(tmp_path / 'r')
    assert saved.name == f'checkpoint-{len(log.rows)}', 'what was learnt is kept on disk too'
    again = trainer_of(start, replace(BASE, num_episodes=len(log.rows) + 1, learning_rate=1e-4), tmp_path / 'r')
    soon(again.load_checkpoint(saved))
    assert again.settings.temperature == .5 and again.settings.learning_rate == 7e-4, 'and so are the knobs'
    soon(again.train())
    assert lines(tmp_path / 'r' / 'metrics.jsonl')[-1]['learning_rate'] == 7e-4

def test_knobs_are_settings_and_a_reference_is_needed_for_beta(start):
    assert set(TrainingRun.knobs) <= set(FIELDS)
    t = trainer_of(start, replace(BASE, beta=.1))
    t.run.set_knob('beta', 0); t.run.set_knob('beta', .2)
    with pytest.raises(ConfigError, match='keeps no reference'): trainer_of(start).run.set_knob('beta', .2)
    TrainingRun().set_knob('beta', .2)
    soon(t.train())

def test_what_is_asked_for_is_served_between_rounds_also_in_a_pause(start, tmp_path):
    async def ask(agent): return {'success': .5}
    run, log, told, served = Watched(), Log(), [], threading.Event()
    def hear(event, more):
        told.append((event, more))
        if event == 'evaluated': served.set()
    run.listeners.append(hear)
    t = trainer_of(start, replace(BASE, num_episodes=10_000, learning_rate=1e-4), tmp_path / 'r', run=run, callbacks=[log], evaluate=ask)
    th = threading.Thread(target=lambda: asyncio.run(t.train()))
    th.start()
    try:
        log.wait(1)
        run.pause()
        assert run.waits.wait(60)
        n = len(log.rows)
        run.request('checkpoint'); run.request('evaluate'); run.set_knob('temperature', .5)
        assert served.wait(60) and run.state == 'paused' and len(log.rows) == n and run.pending == {'temperature': .5}
        assert (tmp_path / 'r' / f'checkpoint-{n}' / 'trainer.json').is_file()
        run.resume()
        log.wait(n + 1)
    finally:
        run.stop()
        th.join(60)
    heard = dict(told)
    assert heard['evaluated'] == {'step': n, 'metrics': {'eval/success': .5}} and run.turned == [(n, 'temperature', .5)] and told[-1][0] == 'ended'
    assert heard['episodes']['groups'] and heard['episodes']['step'] == len(log.rows) and heard['episodes']['tokenizer'] is t.policy.tokenizer
    with pytest.raises(ConfigError, match='needs output_dir'): trainer_of(start).run.request('checkpoint')

def test_a_steered_run_can_be_played_again(start):
    c, log, again = replace(BASE, num_episodes=4), Log(), Log()
    t = trainer_of(start, c, callbacks=[log])
    async def steered():
        async for _ in t.steps():
            if t.step == 2: t.run.set_knob('temperature', .7); t.run.set_knob('learning_rate', 9e-3)
    soon(steered())
    assert t.run.turned == [(2, 'temperature', .7), (2, 'learning_rate', 9e-3)]
    soon(trainer_of(start, c, callbacks=[again], run=TrainingRun(replay=t.run.turned)).train())
    assert [no_time(m) for _, m in again.rows] == [no_time(m) for _, m in log.rows]
    plain = Log()
    soon(trainer_of(start, c, callbacks=[plain]).train())
    assert [no_time(m) for _, m in plain.rows][:2] == [no_time(m) for _, m in log.rows][:2] and no_time(plain.rows[2][1]) != no_time(log.rows[2][1])
    with pytest.raises(ConfigError, match='did you mean'): TrainingRun(replay=[(1, 'temperatur', 1.)])

def test_stopped_before_it_began_and_begun_again(start):
    t = trainer_of(start)
    t.run.stop()
    assert soon(t.train()) is t.agent and t.step == 0 and t.run.state == 'stopped'
    t.run.start()
    soon(t.train())
    assert t.step == 2 and t.run.state == 'done'
    t.run.pause(); assert t.run.state == 'done'
    t2 = trainer_of(start, run=t.run)
    soon(t2.train())
    assert t2.step == 2

def test_evaluate_and_callbacks_are_told(start, tmp_path):
    asked = []
    async def ask(agent): asked.append(agent.policy.version); return {'success': .25, 'n': 4}
    log = Log()
    t = trainer_of(start, replace(BASE, num_episodes=5, eval_steps=2), tmp_path / 'r', evaluate=ask, callbacks=[log, log])
    ms = []
    async def go():
        async for m in t.steps(): ms.append(m)
    soon(go())
    assert [m.get('eval/success') for m in ms] == [None, .25, None, .25, None] and len(asked) == 2 and asked[0] < asked[1]
    assert [s for s, _ in log.rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and [no_time(m) for m in ms] == [no_time(m) for _, m in log.rows[::2]]
    assert lines(tmp_path / 'r' / 'metrics.jsonl') == [{'schema': 1, 'step': i + 1} | m for i, m in enumerate(ms)]
    for d in lines(tmp_path / 'r' / 'trajectories.jsonl'): Trajectory.from_dict({k: v for k, v in d.items() if k != 'step'})

def test_single_turns(start):
    class Answers(Toy):
        def __init__(self): super().__init__(); self.user = None
    t = trainer_of(start, env=Answers(), cls=SingleTurnGRPOTrainer)
    groups = None
    async def go():
        await t.initialize()
        return await t.play()
    groups = soon(go())
    assert all(len(x.turn_rewards) == 1 for g in groups for x in g.trajectories)
    soon(t.train())
    assert t.step == 2

def test_what_cannot_be_trained_is_said(start, tmp_path):
    with pytest.raises(ConfigError, match='no scenarios'): MultiTurnGRPOTrainer(Agent(AgentConfig('stub')), ConversationEnvironment())
    with pytest.raises(ConfigError, match='no local policy'): soon(MultiTurnGRPOTrainer(Agent(AgentConfig('stub')), Toy()).train())
    with pytest.raises(NotTrained): trainer_of(start).save_checkpoint(tmp_path / 'c')
    with pytest.raises(ConfigError, match='sequence'): soon(trainer_of(start, replace(BASE, importance_sampling_level='sequence', turn_credit='turn', max_completion_length=120)).train())

# Files

def test_checkpoints_are_kept_counted_and_never_pickles(start, tmp_path):
    out = tmp_path / 'r'
    (out / 'checkpoint-best').mkdir(parents=True); (out / 'checkpoint-notes.txt').write_text('mine')
    t = trainer_of(start, replace(BASE, num_episodes=5, save_steps=2, save_total_limit=2), out)
    soon(t.train())
    assert sorted(p.name for p in out.iterdir()) == ['checkpoint-4', 'checkpoint-5', 'checkpoint-best', 'checkpoint-notes.txt', 'metrics.jsonl', 'trajectories.jsonl']
    assert last_checkpoint(out).name == 'checkpoint-5' and last_checkpoint(tmp_path) is None
    assert {p.suffix for p in (out / 'checkpoint-5').rglob('*') if p.is_file()} == {'.json', '.safetensors'}
    with pytest.raises(ConfigError, match='holds checkpoint-4, checkpoint-5'): soon(trainer_of(start, out=out).train())
    late = trainer_of(start, replace(BASE, num_episodes=5, save_steps=2), out)
    soon(late.load_checkpoint(out / 'checkpoint-4'))
    with pytest.raises(ConfigError, match='holds checkpoint-5'): soon(late.train())
    (out / 'checkpoint-4').rename(out / 'checkpoint-3')  # as a run leaves it that was killed between the writing of one and the removal of another
    last = trainer_of(start, replace(BASE, num_episodes=5, save_steps=2, save_total_limit=1), out)
    soon(last.load_checkpoint(out / 'checkpoint-5')); soon(last.train())
    assert last_checkpoint(out).name == 'checkpoint-5' and not (out / 'checkpoint-3').exists()

@pytest.mark.parametrize('greater', [True, False])
def test_the_best_checkpoint_is_never_pruned(start, tmp_path, greater):
    c = replace(BASE, num_episodes=6, save_steps=1, save_total_limit=1, metric_for_best_model='eval/score', greater_is_better=greater, eval_steps=2)
    scores = iter([.5, .9, .2, .9])
    async def ask(agent): return {'score': next(scores)}
    t = trainer_of(start, c, tmp_path / 'r', evaluate=ask)
    soon(t.train())
    best = 4 if greater else 6      # the first of equals; rounds without an evaluation are no candidates
    assert best_checkpoint(tmp_path / 'r').name == f'checkpoint-{best}' and {p.name for p in (tmp_path / 'r').glob('checkpoint-*')} == {f'checkpoint-{best}', 'checkpoint-6'}
    more = trainer_of(start, replace(c, num_episodes=8), tmp_path / 'r', evaluate=ask)
    soon(more.load_checkpoint(last_checkpoint(tmp_path / 'r')))
    soon(more.train())
    assert best_checkpoint(tmp_path / 'r').name == f'checkpoint-{best}' and last_checkpoint(tmp_path / 'r').name == 'checkpoint-8'
    assert best_checkpoint(tmp_path) is None

def test_a_metric_nobody_measures_is_no_measure(start, tmp_path):
    async def ask(agent): return {'score': 1.}
    for name in ('rewrd', 'eval/scor'):
        t = trainer_of(start, replace(BASE, metric_for_best_model=name, eval_steps=1), tmp_path / name.replace('/', '-'), evaluate=ask)
        with pytest.raises(ConfigError, match='is not measured — there are reward'): soon(t.train())
    t = trainer_of(start, replace(BASE, num_episodes=2, save_steps=1), tmp_path / 'r')
    soon(t.train())
    assert best_checkpoint(tmp_path / 'r') is None and last_checkpoint(tmp_path / 'r') is not None

def test_a_checkpoint_that_is_none_or_another_s_is_refused(start, tmp_path):
    t = trainer_of(start, replace(BASE, num_episodes=1), tmp_path / 'r')
    soon(t.train())
    good = tmp_path / 'r' / 'checkpoint-1'
    def broken(name, f):
        import shutil
        p = shutil.copytree(good, tmp_path / name); f(p)
        return p
    def load(p, **kw): soon(trainer_of(start, replace(BASE, num_episodes=1, **kw)).load_checkpoint(p))
    load(good)
    for name, f, error in (('none', lambda p: (p / 'trainer.json').unlink(), DataError), ('cut', lambda p: (p / 'trainer.json').write_text('{"step'), DataError), ('empty', lambda p: (p / 'trainer.json').write_text('{}'), DataError),
                           ('moments', lambda p: (p / 'optimizer.safetensors').write_bytes(b'x'), DataError), ('no moments', lambda p: (p / 'optimizer.safetensors').unlink(), DataError),
                           ('weights', lambda p: (p / 'policy' / 'model.safetensors').unlink(), StateSetError)):
        with pytest.raises(error): load(broken(name, f))
    for name, v in FIELDS.items():
        value, base = v if isinstance(v, tuple) else (v, {})
        if name in ('num_episodes', 'save_steps', 'save_total_limit', 'eval_steps'): continue
        with pytest.raises(ConfigError, match=name): load(good, **{k: x for k, x in base.items() if k != 'num_episodes'} | {name: value})

def test_the_log_survives_a_torn_line_and_strange_characters(tmp_path):
    log = RunLog(tmp_path)
    odd = 'ab\u2028c\x85d\x0be\x1cf ☂'
    t = Trajectory('t', 's', 0, (Message('assistant', odd),))
    for i in (1, 2, 3): log.write(i, {'reward': 1.}, [TrajectoryGroup('s', (t, t))])
    f = tmp_path / 'trajectories.jsonl'
    whole = f.read_bytes()
    for cut in range(len(whole) - 40, len(whole)):
        f.write_bytes(whole[:cut])
        log.keep(2)
        assert [d['step'] for d in lines(f)] == [1, 2] and Trajectory.from_dict({k: v for k, v in lines(f)[0].items() if k != 'step'}) == t
    log.keep(0)
    assert f.read_bytes() == b''

# Killed

SMALL = TrainingConfig(num_episodes=6, prompts_per_step=2, num_generations=2, max_completion_length=8, max_turns=3, learning_rate=1e-2, save_steps=2, save_total_limit=1)
RUNS = {'plain': SMALL, 'with a reference, twice, falling': replace(SMALL, beta=.1, num_iterations=2, lr_scheduler_type='cosine', warmup_steps=2, weight_decay=.1, save_steps=1, turn_credit='turn'),
        'with a value head, three times': replace(SMALL, turn_credit='gae', num_iterations=3),
        'steered, filtered, the best kept': replace(SMALL, beta=.1, kl_target=.02, filter_groups=True, metric_for_best_model='reward', save_steps=1)}

def work(start, out, config, die=None):
    "A run in a process of its own: goes on where the last one was killed, and may kill itself before its n-th rename or write."
    if die is not None:
        n = [die]
        def deadly(f):
            def g(*a, **k):
                n[0] -= 1
                if n[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
                return f(*a, **k)
            return g
        Path.rename, os.replace, RunLog.write = deadly(Path.rename), deadly(os.replace), deadly(RunLog.write)
    t = trainer_of(start, config, out)
    async def go():
        if last := last_checkpoint(out): await t.load_checkpoint(last)
        await t.train()
    asyncio.run(go())
    save_policy(t.policy, Path(out) / 'end')

def left(out):
    "What a finished run is: weights, moments, rows."
    last = last_checkpoint(out)
    return {'end': (Path(out) / 'end' / 'model.safetensors').read_bytes(), 'moments': [f.read_bytes() for f in sorted(last.rglob('*.safetensors'))], 'metrics': [no_time(m) for m in lines(Path(out) / 'metrics.jsonl')],
            'trajectories': (Path(out) / 'trajectories.jsonl').read_bytes(), 'checkpoints': sorted(p.name for p in Path(out).glob('checkpoint-*')), 'best': getattr(best_checkpoint(out), 'name', None)}

@pytest.mark.parametrize('name', RUNS)
def test_a_killed_run_ends_as_if_nothing_had_happened(start, forks, tmp_path, name):
    config, rng = RUNS[name], random.Random(name)
    assert forks(work, start, tmp_path / 'warm', config)[0] == 0  # the first one waits for the imports
    code, took = forks(work, start, tmp_path / 'whole', config)
    assert code == 0
    whole = left(tmp_path / 'whole')
    assert [m['step'] for m in whole['metrics']] == [1, 2, 3, 4, 5, 6]
    killed = 0
    for k, moments in enumerate([[('time', rng.uniform(.2, .9)) for _ in range(3)], [('file', n) for n in rng.sample(range(1, 9), 4)]]):
        out = tmp_path / f'killed-{k}'
        for how, x in moments:
            code, _ = forks(work, start, out, config, x) if how == 'file' else forks(work, start, out, config, seconds=took * x)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            if code == 0: break
        assert forks(work, start, out, config)[0] == 0
        now = left(out)
        for part in whole: assert now[part] == whole[part], f'{part} differs after {moments}'
        assert not [p.name for p in out.iterdir() if p.name.startswith('.') and not p.name.startswith('.end.')], 'what was half written is swept up; `end` is ours'
    assert killed >= 3, 'the file system alone kills four times'
