"""The bridge to TRL: settings, episodes and gradients beside those of our own trainers; rewards, callbacks, adapters, and a round on two processes."""
import asyncio, copy, functools, gc, os, pickle, subprocess, sys, threading, time
from dataclasses import replace
import pytest, torch
from conftest import ROOT, Recorder, lacking
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
from stateset_nb.core import ConfigError, Conversation, DataError, Message, MissingDependency, Scenario, StateSetError
from stateset_nb.environments import ConversationEnvironment, ScriptedUser, SupportDesk, desk_scenarios, support_desk_logs
from stateset_nb.policy import CompactFormat, TinyConfig, load_policy, save_policy, tiny_policy
from stateset_nb.rewards import HelpfulnessReward, RewardFunction, RewardResult, reward_function
from stateset_nb.trainers import MultiTurnGRPOTrainer, TrainingConfig, TrainingRun
from stateset_nb.trl_bridge import _KNOBS, _UNMAPPED, as_hf_callback, to_grpo_config, trl_knobs, trl_trainer

pytestmark = [pytest.mark.filterwarnings('ignore:.*gradient_checkpointing.*:FutureWarning'), pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad:UserWarning')]  # TRL's, of transformers
TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope='module')
def trl():
    "TRL, or a line that says how to get it."
    try:
        import trl
        trl.GRPOTrainer
    except ImportError as e: lacking(f"{e.name} is not here: `pip install -c constraints.txt '.[trl]'` tries the bridge")
    gc.freeze()   # a training by TRL ends in a full collection, which need not look at all that was imported
    yield trl
    gc.unfreeze()

@pytest.fixture(scope='module')
def clerk(tmp_path_factory):
    "The folder of a policy that talks somewhat like a clerk of the support desk."
    return save_policy(tiny_policy(support_desk_logs(60, 0), 0, TinyConfig(60, 8, hidden_size=32, layers=1, max_tokens=512), cache=False), tmp_path_factory.mktemp('clerk') / 'policy')

def an_agent(folder): return Agent(AgentConfig('clerk'), PolicyBackend(load_policy(folder)))

@functools.cache
def words():
    "A policy that says a word, and when it is doubted another."
    said = 'yes no maybe later never soon'.split()
    talks = [Conversation((Message('user', 'Hello'), Message('assistant', a), Message('user', 'Really ?'), Message('assistant', b)), id=f'{a}-{b}') for a in said for b in said]
    return tiny_policy(talks, config=TinyConfig(100, 12, hidden_size=32, layers=1, max_tokens=128, short_first=0.), cache=False)

def toy(): return Agent(AgentConfig('toy'), PolicyBackend(copy.deepcopy(words())))

def talk(n=2, lines=('Really ?',), **kw): return ConversationEnvironment([Scenario(f'hello-{i}', (Message('user', 'Hello ' * (i + 1)),)) for i in range(n)], user=ScriptedUser(lines), **kw)

@reward_function
def odd(turns): return sum(len(m.text) % 2 for m in turns if m.role == 'assistant') / 4

SMALL = TrainingConfig(num_episodes=1, prompts_per_step=2, num_generations=4, max_completion_length=6, learning_rate=1e-2, max_grad_norm=1e9)

class Book:
    def __init__(self): self.rows = []
    def on_log(self, step, metrics): self.rows.append((step, metrics))

def by_trl(agent, env, reward_fn, config, tmp_path, **kw):
    "TRL's training by the bridge, without its printing."
    from transformers import PrinterCallback
    t = trl_trainer(agent, env, reward_fn, config, output_dir=tmp_path, **dict(use_cpu=True, disable_tqdm=True, save_strategy='no') | kw)
    t.remove_callback(PrinterCallback)
    t.train()
    return t

def both(make, env, reward_fn, config, tmp_path, scenarios=None, **kw):
    "Gradients and logs of both trainers, from the same weights, by plain gradient descent."
    mine, theirs = make(), make()
    a = MultiTurnGRPOTrainer(mine, env, reward_fn, config, scenarios=scenarios)
    asyncio.run(a.initialize())
    a.optimizer = Recorder(mine.policy.model, config.learning_rate)
    async def all_steps(): return [m async for m in a.steps()]
    metrics = asyncio.run(all_steps())
    opt = Recorder(theirs.policy.model, config.learning_rate)
    logs = [m for m in by_trl(theirs, env, reward_fn, config, tmp_path, scenarios=scenarios, optimizers=(opt, None), **kw).state.log_history if 'train_runtime' not in m]
    return a.optimizer.grads, metrics, opt.grads, logs

def close(a, b, rel=1e-5):
    assert b.abs().max() > 0 and (a - b).abs().max() <= rel * b.abs().max(), f'{((a - b).abs().max() / b.abs().max()).item():.1e} apart'


# --- settings ---

def test_without_trl_the_extra_is_named(monkeypatch, tmp_path):
    for lost in ('trl', 'datasets'):
        monkeypatch.setitem(sys.modules, lost, None)
        with pytest.raises(MissingDependency, match=rf"{lost} is not installed — .* pip install 'stateset-nb\[trl\]'"): to_grpo_config(TrainingConfig(), tmp_path)
        with pytest.raises(MissingDependency, match=r'\[trl\]'): trl_trainer(toy(), talk(), odd, SMALL, output_dir=tmp_path)
        monkeypatch.undo()

OTHER = {int: lambda v: v + 1, float: lambda v: v / 2 + .15, bool: lambda v: not v}
CHOICES = {'lr_scheduler_type': 'cosine', 'loss_type': 'grpo', 'importance_sampling_level': 'sequence', 'kl': 'k2', 'turn_credit': 'turn'}

MORE = {'delta': 2., 'vllm_importance_sampling_clip_min': .5, 'metric_for_best_model': 'reward', 'multi_objective_aggregation': 'normalize_then_sum', 'vllm_importance_sampling_mode': 'token_mask', 'scheduling': 'eager'}
NEEDS = {'kl_target': {'beta': .1}, 'sync_ref_model': {'beta': .1}, 'memory_limit': {'micro_batch_tokens': 0}, 'truncated_in_baseline': {'mask_truncated_completions': True}}
def changed(name, v): return {name: CHOICES.get(name) or MORE.get(name) or OTHER[type(v)](v)}

@pytest.mark.parametrize('name, default', TrainingConfig().to_dict().items())
def test_every_setting_is_mapped_or_refused(trl, tmp_path, name, default):
    "A changed setting changes TRL's of the name in the table, or it is refused, saying why; none is dropped."
    assert (name in _KNOBS) != (name in _UNMAPPED) and name in trl_knobs().index
    base, config = TrainingConfig(**NEEDS.get(name, {})), TrainingConfig(**NEEDS.get(name, {}) | changed(name, default))
    if name in _UNMAPPED:
        with pytest.raises(ConfigError, match=f'{name}=.* — ' if name != 'memory_limit' else 'give per_device_train_batch_size'): to_grpo_config(config, tmp_path)
    elif to := _KNOBS[name][0]:
        a, b = to_grpo_config(base, tmp_path), to_grpo_config(config, tmp_path)
        assert vars(a)[to] != vars(b)[to]
        moved = {k for k in vars(a) if vars(a)[k] != vars(b)[k] and isinstance(vars(a)[k], (int, float, str))} - {to, 'generation_batch_size', 'steps_per_generation', 'run_name'}
        also = {'gradient_checkpointing': {'activation_checkpointing'}, 'bf16': {'use_cpu', 'mixed_precision', 'dataloader_pin_memory'}, 'num_iterations': {'max_steps', 'save_steps', 'ref_model_sync_steps'}, 'num_episodes': {'save_steps'}, 'warmup_steps': {'lr_scheduler_type'}, 'num_generations': {'per_device_train_batch_size'}}
        assert moved <= also.get(name, set()), f'{name} also changes {moved}'
        if name not in ('num_episodes', 'prompts_per_step', 'max_turns', 'scale_rewards'): assert vars(b)[to] == changed(name, default)[name]
    else: assert name in ('rollout_limit', 'max_total_tokens')   # kept by our rollouts

def test_what_a_round_is_in_updates_and_rows(trl, tmp_path):
    c = TrainingConfig(num_episodes=5, num_iterations=3, prompts_per_step=6, num_generations=4, save_steps=2, warmup_steps=2, scale_rewards=False)
    a = to_grpo_config(c, tmp_path)
    assert (a.max_steps, a.save_steps, a.warmup_steps, a.generation_batch_size, a.scale_rewards) == (15, 6, 6, 24, 'none') and a.lr_scheduler_type == 'constant_with_warmup'
    a = to_grpo_config(c, tmp_path, per_device_train_batch_size=12)
    assert (a.gradient_accumulation_steps, a.steps_per_generation, a.generation_batch_size) == (2, 2, 24)
    assert (a.bf16, a.gradient_checkpointing, a.shuffle_dataset, a.logging_steps) == (False, False, False, 1)

@pytest.mark.parametrize('kw, says', [(dict(temperature=.5), 'follows from temperature=1.0'), (dict(steps_per_generation=2), 'follows from prompts_per_step'), (dict(per_device_train_batch_size=5), 'without rest'),
                                      (dict(bf6=True), "did you mean 'bf16'"), (dict(num_train_epochs=2), 'follows from num_episodes')])
def test_overrides_may_add_but_not_contradict(trl, tmp_path, kw, says):
    with pytest.raises(ConfigError, match=says): to_grpo_config(TrainingConfig(), tmp_path, **kw)


# --- the same episodes, the same gradient ---

RUNS = [dict(loss_type='dapo'), dict(loss_type='grpo'), dict(loss_type='bnpo', micro=8), dict(loss_type='dr_grpo'), dict(loss_type='cispo', epsilon_high=5.), dict(loss_type='grpo', importance_sampling_level='sequence'),
        dict(scale_rewards=False), dict(temperature=.7), dict(beta=.2, num_iterations=2), dict(num_iterations=3), dict(max_turns=1), dict(seed=5)]

@pytest.mark.parametrize('run', RUNS, ids=lambda r: '-'.join(map(str, r.values())))
def test_same_first_updates_as_our_trainer(trl, tmp_path, run):
    run = dict(run)
    micro = run.pop('micro', 4)
    mine, ours, theirs, logs = both(toy, talk(2), odd, replace(SMALL, **run), tmp_path, per_device_train_batch_size=micro)
    assert len(mine) == len(theirs) == run.get('num_iterations', 1)   # the entropy of TRL is a mean of means when a round is cut
    for a, b in zip(mine, theirs): close(a, b)
    for k in ('reward', 'frac_reward_zero_std', 'completions/mean_length', 'num_turns/mean', 'error_rate', 'rewards/odd/mean'): assert ours[0][k] == pytest.approx(logs[0][k], abs=1e-6), k
    for k in ('loss', 'grad_norm', *(['entropy'] if micro == 8 else [])): assert ours[0][k] == pytest.approx(logs[-1][k], rel=1e-5, abs=1e-6), k
    assert logs[0]['rewards/episode/mean'] == logs[0]['reward'] and logs[0]['num_turns/mean'] == (1 if run.get('max_turns') else pytest.approx(ours[0]['num_turns/mean']))

def test_same_updates_on_the_support_desk(trl, tmp_path, clerk):
    "Tools, a database and customers who speak again; three rounds in a row from the same weights."
    desk, six = SupportDesk(), desk_scenarios(6, difficulties=(1, 2))
    config = TrainingConfig(num_episodes=3, prompts_per_step=2, num_generations=4, max_completion_length=24, learning_rate=1e-2, max_grad_norm=1e9)
    mine, ours, theirs, logs = both(lambda: an_agent(clerk), desk, odd, config, tmp_path, scenarios=six)
    assert len(mine) == len(theirs) == len(ours) == 3
    close(mine[0], theirs[0])
    for m, l in zip(ours, logs): assert [m[k] for k in ('reward', 'num_turns/mean', 'success')] == pytest.approx([l[k] for k in ('reward', 'num_turns/mean', 'success')], abs=1e-6)
    assert logs[0]['num_turns/mean'] > 1

class Moody:
    "Leaves when it has heard a word of five letters."
    async def reply(self, messages, scenario, seed): return None if len(messages[-1].text) == 5 else Message('user', 'Really ?')

class Flaky(ConversationEnvironment):
    "Fails when it hears a word of three letters."
    async def step(self, message):
        if len(message.text) == 3: raise DataError('the line is dead')
        return await super().step(message)

@pytest.mark.parametrize('kind', ['dapo', 'grpo', 'dr_grpo'])
def test_failed_and_cut_episodes_teach_nothing_in_both(trl, tmp_path, kind):
    "Where a loss is a mean over rows, TRL's mean runs over those that teach nothing too, and its step is that much smaller."
    env = Flaky(talk(2).scenarios, user=Moody(), max_turns=2)
    config = replace(SMALL, loss_type=kind, max_completion_length=12, num_generations=16, mask_truncated_completions=True)
    mine, ours, theirs, logs = both(toy, env, odd, config, tmp_path)
    assert 0 < ours[0]['error_rate'] < 1 and ours[0]['error_rate'] == pytest.approx(logs[0]['error_rate']) and ours[0]['completions/clipped_ratio'] > 0
    scale = 1 if kind == 'dapo' else (1 - ours[0]['error_rate']) * (1 - ours[0]['completions/clipped_ratio'])
    close(mine[0] * scale, theirs[0])

def test_a_round_in_which_everything_fails_raises(trl, tmp_path):
    class Dead(ConversationEnvironment):
        async def step(self, message): raise DataError('the line is dead')
        async def cut(self): raise DataError('the line is dead')
    with pytest.raises(StateSetError, match='every one of 8 episodes failed — the first error: DataError: the line is dead'): by_trl(toy(), Dead(talk(2).scenarios), odd, SMALL, tmp_path)

def test_a_talk_in_two_stretches_is_refused(trl, tmp_path):
    "A template that rewrites what was said has no one row; TRL would learn from tokens that were never together."
    class Forgetful(CompactFormat):
        def extend(self, ids, before, new, tools=None): return self.start([*before, *new]), True
    agent = toy()
    agent.policy.format = Forgetful(agent.policy.tokenizer)
    with pytest.raises(ConfigError, match='has 2 stretches of tokens: the chat template rewrites'): by_trl(agent, talk(1, lines=('Really ?',)), odd, replace(SMALL, max_completion_length=30, prompts_per_step=1), tmp_path)


# --- it learns ---

def test_a_bandit_learns_by_the_bridge(trl, tmp_path):
    "One prompt, six answers, one is worth 1."
    from stateset_nb.core import demo_conversations
    six = [replace(c, messages=(Message('user', 'Hello'), Message('assistant', w)), id='') for c, w in zip(demo_conversations(), 'yes no maybe later never soon'.split(), strict=True)]
    agent = Agent(AgentConfig('tiny'), PolicyBackend(tiny_policy(six, config=TinyConfig(150, 6, hidden_size=32, layers=1, short_first=0., max_tokens=64), cache=False)))
    env = ConversationEnvironment([Scenario('hello', (Message('user', 'Hello'),))])
    @reward_function
    def says_soon(turns): return float(turns[-1].text == 'soon')
    book = Book()
    config = TrainingConfig(num_episodes=25, prompts_per_step=2, num_generations=16, learning_rate=2e-3, max_completion_length=6, max_turns=1)
    t = by_trl(agent, env, says_soon, config, tmp_path, callbacks=[book])
    rewards = [m['reward'] for s, m in book.rows if 'train_runtime' not in m]
    assert len(rewards) == 25 and rewards[0] < .5 and rewards[-1] > .9
    assert t.model is agent.policy.model and not t.model.config._name_or_path.endswith('reference')
    assert sum(asyncio.run(agent.generate_response('Hello')) == 'soon' for _ in range(8)) >= 7


# --- rewards in TRL's own generation ---

def test_single_answers_are_generated_by_trl_and_scored_by_us(trl, tmp_path):
    agent = toy()
    agent.policy.tokenizer.chat_template = TEMPLATE
    seen = []
    class Length(RewardFunction):
        async def compute_reward(self, turns, context=None):
            seen.append((turns, context))
            return RewardResult(1 / (1 + len(turns[-1].text)))
    t = by_trl(agent, None, Length(), replace(SMALL, num_episodes=2), tmp_path, scenarios=talk(2).scenarios)
    assert t.state.global_step == 2 and t.rollout_func is None and 'rewards/Length/mean' in t.state.log_history[0]
    assert len(seen) == 16 and all([m.role for m in turns] == ['user', 'assistant'] and context.scenario.id.startswith('hello-') for turns, context in seen)

def test_rewards_as_trl_calls_them():
    f = HelpfulnessReward()
    g = pickle.loads(pickle.dumps(f))
    talks = ([[{'role': 'user', 'content': 'Where is it?'}]] * 2, [[{'role': 'assistant', 'content': 'It is on its way and arrives tomorrow.'}], [{'role': 'assistant', 'content': ''}]])
    res = asyncio.run(f(*talks))
    assert res == asyncio.run(g(*talks, trainer_state=None, log_metric=print)) and f.__name__ == g.__name__ == HelpfulnessReward.name and res[0] > res[1]
    assert asyncio.run(f(['Where is it?'], ['It is on its way and arrives tomorrow.'])) == res[:1]

def test_an_answer_that_cannot_be_scored_is_none_and_all_of_them_an_error(caplog):
    @reward_function
    def picky(turns):
        if not turns[-1].text: raise ValueError('empty')
        return 1.
    f = picky
    assert asyncio.run(f(['a', 'b', 'c'], ['x', '', 'z'])) == [1., None, 1.] and '1 of 3 answers have no reward' in caplog.text
    with pytest.raises(StateSetError, match='empty'): asyncio.run(f(['a', 'b'], ['', '']))


# --- callbacks ---

def test_a_watcher_hears_every_key(trl, tmp_path):
    book = Book()
    t = by_trl(toy(), talk(2), odd, replace(SMALL, num_episodes=2, num_iterations=2), tmp_path, callbacks=[book])
    told = [(l['step'], set(l) - {'step'}) for l in t.state.log_history]
    assert [s for s, _ in book.rows] == [s for s, _ in told] == [1, 2, 3, 4, 4]
    for (_, m), (_, keys) in zip(book.rows, told): assert keys <= set(m) and all(isinstance(v, (int, float)) for v in m.values())

def test_a_run_pauses_turns_its_knobs_and_stops(trl, tmp_path):
    run = TrainingRun()
    class Hand:
        "Pauses at the second update; somebody else goes on."
        def __init__(self): self.states = []
        def on_log(self, step, metrics):
            self.states.append((step, run.state, metrics.get('learning_rate')))
            if step == 2:
                run.set_knob('learning_rate', 5e-3); run.set_knob('max_grad_norm', .25); run.pause()
                threading.Timer(.2, run.resume).start()
            if step == 4: run.stop('enough')
    hand = Hand()
    t = by_trl(toy(), talk(2), odd, replace(SMALL, num_episodes=9), tmp_path, callbacks=[run, hand], save_strategy='steps')
    # the log of an update is told after its boundary, so what is said there holds from the boundary after the next update
    assert run.state == 'stopped' and t.state.global_step == 5 and (tmp_path / 'checkpoint-5').is_dir()
    assert t.args.max_grad_norm == .25 and {r for s, _, r in hand.states if s == 5} == {5e-3}
    with pytest.raises(ConfigError, match='stopped before it began'): as_hf_callback(run)

def test_a_run_that_ends_by_itself_is_done_and_its_checkpoint_is_there(trl, tmp_path):
    run = TrainingRun()
    by_trl(toy(), talk(2), odd, replace(SMALL, num_episodes=3), tmp_path, callbacks=[run], save_strategy='steps')
    assert run.state == 'done' and sorted(p.name for p in tmp_path.glob('checkpoint-*')) == ['checkpoint-3']
    with pytest.raises(ConfigError): run.set_knob('temperature', .5)

def test_the_training_widget_leads_trl_as_it_leads_our_trainers(trl, tmp_path):
    from stateset_nb.widgets import watch_hf_training
    from transformers import PrinterCallback
    t = trl_trainer(toy(), talk(2), odd, replace(SMALL, num_episodes=500), output_dir=tmp_path, use_cpu=True, disable_tqdm=True, save_strategy='no')
    t.remove_callback(PrinterCallback)
    w = watch_hf_training(t)
    def press(kind, **more): return w.handle({'kind': kind, **more})
    def until(true):
        end = time.monotonic() + 120
        while not true(): assert time.monotonic() < end; time.sleep(.01)
    assert press('start')['ok']
    until(lambda: w.history.step >= 2)
    press('pause')
    assert press('knob', name='learning_rate', value=5e-3)['ok'] and not press('knob', name='temperature', value=.5)['ok'] and press('request', what='checkpoint')['ok']
    until(lambda: w.run.state == 'paused'); press('resume')
    until(lambda: w.history.knobs == {'learning_rate': 5e-3})
    at, = (step for step, _, _ in w.run.turned)
    until(lambda: w.history.step >= at + 2)
    assert press('stop')['ok']; w.wait(120)
    assert w.view()['state'] == 'stopped' and w.history.step == t.state.global_step < 100 and (tmp_path / f'checkpoint-{at}').is_dir()
    assert t.optimizer.param_groups[0]['lr'] == 5e-3 and {'reward', 'reward_std', 'kl' if t.args.beta else 'loss', 'grad_norm'} <= set(w.history.table.columns)

def test_taken_up_again_it_plays_the_rounds_that_are_left(trl, tmp_path):
    config, book, again = replace(SMALL, num_episodes=4, save_steps=2), Book(), Book()
    by_trl(toy(), talk(4), odd, config, tmp_path, callbacks=[book], save_strategy='steps')
    t = trl_trainer(toy(), talk(4), odd, config, output_dir=tmp_path, use_cpu=True, disable_tqdm=True, callbacks=[again])
    t.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-2'))
    def told(b): return [(s, m['reward'], round(m['grad_norm'], 4)) for s, m in b.rows if 'train_runtime' not in m]
    assert told(again) == told(book)[2:]


# --- adapters, processes ---

def test_adapters_learn_and_play(trl, tmp_path):
    try: import peft
    except ImportError: lacking("peft is not here: `pip install -c constraints.txt '.[trl]'` trains adapters by the bridge")
    agent = toy()
    before = {k: v.clone() for k, v in agent.policy.model.state_dict().items()}
    config = replace(SMALL, num_episodes=3, beta=.1, learning_rate=.1)
    t = by_trl(agent, talk(2), odd, config, tmp_path, peft_config=peft.LoraConfig(r=2, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM'))
    now = t.model.state_dict()
    assert any(v.abs().sum() > 0 for k, v in now.items() if 'lora_B' in k), 'the adapters have moved'
    assert all(torch.equal(v, next(w for n, w in now.items() if n.replace('.base_layer', '').endswith('.' + k))) for k, v in before.items()), 'the weights below have not'
    assert not (tmp_path / 'reference').exists() and t.state.log_history[-2]['kl'] > 0
    reply = asyncio.run(agent.respond('Hello', seed=1))
    ids = torch.tensor([[*reply.prompt_ids, *reply.ids]])
    with torch.no_grad(): logps = torch.log_softmax(t.model(input_ids=ids).logits[0, len(reply.prompt_ids) - 1:-1], -1).gather(-1, torch.tensor(reply.ids)[:, None]).squeeze(-1)
    torch.testing.assert_close(logps, torch.tensor(reply.logps), rtol=1e-4, atol=1e-4)
    t.model.merge_and_unload()
    assert agent.policy.model.state_dict().keys() == before.keys() and load_policy(save_policy(agent.policy, tmp_path / 'merged')).name

def test_afterwards_the_policy_is_its_own(trl, tmp_path):
    "A copy speaks with its own weights, and the trainer can go on."
    agent = toy()
    t = by_trl(agent, talk(2), odd, SMALL, tmp_path)
    other = copy.deepcopy(agent.policy.model)
    with torch.no_grad():
        for p in other.parameters(): p.zero_()
        assert other(input_ids=torch.tensor([[4, 5]])).logits.abs().max() == 0
    assert save_policy(agent.policy, tmp_path / 'p') and agent.policy.model.config._name_or_path == ''
    t.train()
    assert t.state.global_step == 1 and t.state.log_history[0]['grad_norm'] > 0

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
import torch
from transformers import PrinterCallback
import test_trl_bridge as T
run = T.TrainingRun()
class Hand:
    def on_log(self, step, metrics):
        if step == 1: run.stop('enough')
t = T.by_trl(T.toy(), T.talk(2), T.odd, replace(T.SMALL, num_episodes=9), sys.argv[2], callbacks=[run, Hand()])
assert t.state.global_step == 2 and t.accelerator.num_processes == int(sys.argv[3])
if t.accelerator.is_main_process: print(json.dumps([{k: m.get(k) for k in ('reward', 'frac_reward_zero_std', 'grad_norm', 'error_rate')} for m in t.state.log_history[:2]]))
"""

def test_two_processes_play_one_round(trl, tmp_path):
    "A group spread over processes: the same episodes, the same gradient; the run of the first stops both."
    import json
    file = tmp_path / 'go.py'
    file.write_text(SCRIPT)
    env = os.environ | {'PYTHONPATH': f'{ROOT}', 'OMP_NUM_THREADS': '1'}
    def go(*launch):
        done = subprocess.run([sys.executable, *launch, file, ROOT / 'tests', tmp_path, '2'], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])
    two = go('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')
    one = [{k: m.get(k) for k in two[0]} for m in by_trl(toy(), talk(2), odd, replace(SMALL, num_episodes=2), tmp_path).state.log_history[:2]]
    for a, b in zip(two, one): assert a == pytest.approx(b, rel=1e-4)
