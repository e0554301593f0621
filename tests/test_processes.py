"""One run on several processes: the same episodes, loss and weights as on one; a lost process is said; what a pass keeps, and what is kept of it."""
import asyncio, json, os, shutil, subprocess, sys
from dataclasses import replace
import pytest, torch
from conftest import ROOT
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
from stateset_nb.core import ConfigError, set_seed
from stateset_nb.environments import SupportDesk, desk_scenarios, support_desk_logs
from stateset_nb.policy import TinyConfig, add_lora, load_policy, save_policy, tiny_policy
from stateset_nb.rewards import reward_function
from stateset_nb.trainers import MultiTurnGRPOTrainer, Row, TrainingConfig, bytes_per_token, fitting_tokens, last_checkpoint

CONFIG = TrainingConfig(num_episodes=3, prompts_per_step=3, num_generations=4, max_completion_length=12, max_turns=3, learning_rate=1e-3, num_iterations=2, micro_batch_tokens=300, save_steps=1, save_total_limit=9)
WAYS = {'as it stands': {}, 'sharded': {'fsdp': True}, 'with a reference': {'beta': .05, 'sync_ref_model': True, 'ref_model_sync_steps': 2}, 'sharded, with a reference': {'fsdp': True, 'beta': .05},
        'with a value head': {'turn_credit': 'gae'}, 'batch and bonus': {'scale_rewards': 'batch', 'entropy_coef': .01}}

@reward_function
def odd(turns): return sum(len(m.text) % 3 for m in turns if m.role == 'assistant') / 6

def trainer_of(start, out, config, policy=None):
    return MultiTurnGRPOTrainer(Agent(AgentConfig('clerk'), PolicyBackend(policy or load_policy(start, dtype='float64'))), SupportDesk(), odd, config, scenarios=desk_scenarios(8, 0), output_dir=out)

async def rounds(trainer): return [m async for m in trainer.steps()]

SCRIPT = '''
import asyncio, json, os, sys
import torch; torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from test_processes import CONFIG, WAYS, rounds, trainer_of
from stateset_nb.trainers import last_checkpoint
start, out, way, how = sys.argv[2:6]
t = trainer_of(start, out, replace(CONFIG, **WAYS[way]))
if how == 'die':
    import stateset_nb.trainers as module
    real = module.learn
    def learn(*a, **k):
        if os.environ['RANK'] == '1' and t.step == 1: os._exit(7)
        return real(*a, **k)
    module.learn = learn
async def go():
    if how == 'resume': await t.load_checkpoint(last_checkpoint(out))
    return await rounds(t)
log = asyncio.run(go())
if os.environ.get('RANK', '0') == '0': print(json.dumps(log), flush=True)
'''

def launch(tmp_path, start, way, how='run', out='two', n=2):
    file = tmp_path / 'go.py'
    file.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')} | {'PYTHONPATH': f'{ROOT}', 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', f'{n}', file, ROOT / 'tests', start, tmp_path / out, way, how], env=env, capture_output=True, text=True, timeout=300)

@pytest.fixture(scope='module')
def start(tmp_path_factory):
    "The folder of a policy that talks somewhat like a clerk."
    return save_policy(tiny_policy(support_desk_logs(60, 0), 0, TinyConfig(60, 8, hidden_size=32, layers=2, max_tokens=512), cache=False), tmp_path_factory.mktemp('start') / 'policy')

def weights(folder): return torch.cat([p.detach().flatten() for p in load_policy(last_checkpoint(folder) / 'policy').model.parameters()])

@pytest.mark.parametrize('way', WAYS)
def test_two_processes_are_one(way, start, tmp_path):
    "In float64, so that what is sampled does not hang on the last digit."
    done = launch(tmp_path, start, way)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout.strip().splitlines()[-1])
    config = replace(CONFIG, **WAYS[way] | {'fsdp': False})
    one = asyncio.run(rounds(trainer_of(start, tmp_path / 'one', config)))
    for a, b in zip(two, one, strict=True):
        assert set(a) == set(b)
        for k in a:
            if not k.startswith('time/'): assert a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-7), k
    before, after = (weights(tmp_path / x) for x in ('one', 'two'))
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-7) and (before - torch.cat([p.detach().flatten() for p in load_policy(start, dtype='float64').model.parameters()])).abs().max() > 1e-4
    lines = [[json.loads(x) for x in (tmp_path / f / 'metrics.jsonl').read_text().splitlines()] for f in ('one', 'two')]
    assert [m['step'] for m in lines[1]] == [1, 2, 3] and len((tmp_path / 'one/trajectories.jsonl').read_text().splitlines()) == len((tmp_path / 'two/trajectories.jsonl').read_text().splitlines())

def test_a_killed_process_ends_the_run_and_it_is_taken_up(start, tmp_path):
    way = 'sharded, with a reference'
    died = launch(tmp_path, start, way, 'die')
    assert died.returncode != 0 and 'exitcode  : 7' in died.stderr, died.stderr[-2000:]
    assert last_checkpoint(tmp_path / 'two').name == 'checkpoint-1'
    done = launch(tmp_path, start, way, 'resume')
    assert done.returncode == 0, done.stderr[-3000:]
    assert launch(tmp_path, start, way, out='whole').returncode == 0
    assert torch.equal(weights(tmp_path / 'two'), weights(tmp_path / 'whole'))

def test_a_lost_process_is_said():
    from stateset_nb.core import BackendError
    from stateset_nb.trainers import Processes
    p = Processes()
    with pytest.raises(BackendError, match='has lost another one .Connection closed by peer. .* load_checkpoint'), p._together(): raise RuntimeError('Connection closed by peer')

def test_sharding_alone_is_refused(start, tmp_path):
    with pytest.raises(ConfigError, match='torchrun --nproc_per_node'): asyncio.run(rounds(trainer_of(start, None, replace(CONFIG, fsdp=True))))

# One process

def test_checkpointed_layers_and_found_micro_batches_change_nothing(start, tmp_path):
    "The same updates to a millionth, with less kept; the number that was found belongs to the run, and is taken up with it."
    results = {}
    for name, kw in {'plain': {}, 'little': {'gradient_checkpointing': True}, 'found': {'micro_batch_tokens': 0, 'memory_limit': .02}}.items():
        t = trainer_of(start, tmp_path / name, replace(CONFIG, **kw))
        results[name] = asyncio.run(rounds(t)), weights(tmp_path / name), t
    for name in ('little', 'found'): assert torch.allclose(results[name][1], results['plain'][1], rtol=1e-5, atol=1e-7), name
    found = results['found'][2]
    assert 300 < found.settings.micro_batch_tokens < 10**6 and found.config.micro_batch_tokens == 0
    again = trainer_of(start, tmp_path / 'found', replace(CONFIG, micro_batch_tokens=0, memory_limit=.02))
    for k in (2, 3): shutil.rmtree(tmp_path / 'found' / f'checkpoint-{k}')
    async def go():
        await again.load_checkpoint(tmp_path / 'found' / 'checkpoint-1')
        return await rounds(again)
    assert len(asyncio.run(go())) == 2 and again.settings == found.settings and torch.equal(weights(tmp_path / 'found'), results['found'][1])

def test_what_a_pass_keeps_is_what_was_counted(start):
    "More layers keep more, checkpointed ones less; a limit twice as high lets twice as many tokens in."
    row = Row((5,) * 300, (0,) * 50 + (1,) * 250, (0.,) * 300, (1.,) * 300)
    p = load_policy(start)
    assert bytes_per_token(p, row, replace(CONFIG, gradient_checkpointing=True)) < .7 * bytes_per_token(p, row, CONFIG)
    one, two = (fitting_tokens(p, [row], replace(CONFIG, micro_batch_tokens=0, memory_limit=x)) for x in (.1, .2))
    assert abs(two / one - 2) < .01
    assert fitting_tokens(p, [row], replace(CONFIG, micro_batch_tokens=0, memory_limit=1e-6)) == 300, 'the longest row always has its pass'

@pytest.mark.parametrize('kw', [{}, {'beta': .05}, {'gradient_checkpointing': True}], ids=str)
def test_an_adapter_is_trained_and_taken_up(kw, start, tmp_path):
    "Only the adapter moves, its reference is the base, and a run that was cut ends with the same bits."
    pytest.importorskip('peft')
    config = replace(CONFIG, learning_rate=1e-2, **kw)
    def new(out): return trainer_of(start, out, config, add_lora(load_policy(start), rank=2))
    whole = new(tmp_path / 'whole')
    asyncio.run(rounds(whole))
    base = {k: v for k, v in load_policy(start).model.named_parameters()}
    for k, v in whole.policy.model.named_parameters():
        if 'lora' not in k: assert torch.equal(v, base[k.replace('.base_layer', '')]) and not v.requires_grad
    if 'beta' in kw: assert whole.reference is whole.policy and not (tmp_path / 'whole/checkpoint-3/reference').exists()
    cut = new(tmp_path / 'cut')
    async def go():
        await cut.load_checkpoint(tmp_path / 'whole' / 'checkpoint-1')
        return await rounds(cut)
    log = asyncio.run(go())
    assert len(log) == 2 and ('kl' in log[-1]) == ('beta' in kw) and (log[-1].get('kl', 1) > 0)
    mine, theirs = dict(cut.policy.model.named_parameters()), dict(whole.policy.model.named_parameters())
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs) and any(v.abs().max() > 0 for k, v in mine.items() if 'lora_B' in k)

def test_bfloat16_learns_too(start, tmp_path):
    set_seed(0)
    t = trainer_of(start, tmp_path / 'near', replace(CONFIG, bf16=True), load_policy(start))
    exact = trainer_of(start, tmp_path / 'exact', CONFIG, load_policy(start))
    near, log = asyncio.run(rounds(t)), asyncio.run(rounds(exact))
    assert near[0]['grad_norm'] == pytest.approx(log[0]['grad_norm'], rel=.1) and near[0]['grad_norm'] != log[0]['grad_norm']
