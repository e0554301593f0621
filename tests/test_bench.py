"""The benches: what they call met, what they merge, and what they write. That of the demo is not run here, that of the engine with tiny settings."""
import importlib.util, json, os, subprocess, sys
from pathlib import Path
import pytest
from conftest import lacking

def load(name):
    spec = importlib.util.spec_from_file_location(f'{name}_bench', Path(__file__).parent.parent/'benchmarks'/f'{name}.py')
    m = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = m  # dataclasses look their module up
    spec.loader.exec_module(m)
    return m

@pytest.fixture(scope='module')
def bench(): return load('support_desk')

def rate(v, n=200): return {'value': v, 'low': max(0, v-.05), 'high': min(1, v+.05), 'n': n}

def record(bench, setting='few logs', seed=0, trained=.95, equal=.8, cpu=80, rare=.95):
    "What a seed might leave."
    c = bench.settings('full', setting, seed)
    level = {('logs', ''): .3, ('clone', 'sampled'): .3, ('clone', 'served'): .5, ('filtered', 'sampled'): .6, ('filtered', 'served'): .7, ('equal', 'sampled'): equal-.02, ('equal', 'served'): equal,
             ('trained', 'sampled'): trained-.02, ('trained', 'served'): trained}
    name = lambda k: ' '.join(k).strip()
    def pair(a, b):
        d = level[b]-level[a]
        verdict = 'better' if d > .04 else 'not_worse' if d > -.01 else 'worse' if d < -.04 else 'inconclusive'
        return {'before': name(a), 'after': name(b), 'difference': d, 'low': d-.04, 'high': d+.04, 'verdict': verdict, 'n': 200}
    rows = [{'who': w, 'how': h, 'success': rate(v), 'rare_rule': rate(rare if w=='trained' else .1, 40), 'by_difficulty': {'1': rate(v), '5': rate(v)}} for (w,h),v in level.items()]
    pairs = [pair(k, ('trained', h)) for h in bench.HOW for k in level if k[0]!='trained' and k[1] in ('', h)]
    return {'schema': 1, 'mode': 'full', 'setting': setting, 'seed': seed, 'date': '2026-01-01', 'machine': {'cpu': 'x', 'cores': 2, 'system': 'Linux', 'load_before': 0., 'load_after': 1.}, 'threads': 1,
            'versions': {'python': '3'}, 'settings': bench.about(c), 'data': bench.data_hash(c), 'margin': .05, 'log_success': {'logs': 4000, 'successful': 1200, 'rare_rule_due': 100, 'rare_rule_followed': 5},
            'stages': {s: {'wall_s': cpu, 'cpu_s': cpu} for s in ('clone', 'practice', 'filtered', 'test logs', 'the rest')}, 'equal_compute': {'steps': 9, 'wall_s': 210, 'cpu_s': 2*cpu+10, 'cpu_s_needed': 2*cpu},
            'copies_numbers': 1., 'clone_minus_logs': 0., 'rows': rows, 'comparisons': pairs, 'filter_against_practice': [pair(('trained', h), ('equal', h)) for h in bench.HOW]}

def test_checks_say_met_and_not_met(bench):
    good = bench.judge([record(bench), record(bench, seed=1)])
    assert all(c['met'] for c in good) and len(good)==8
    short = {c['check']: c for c in bench.judge([record(bench), record(bench, seed=1, trained=.82, cpu=130, rare=.8)])}
    lost = {k.split(':')[0] for k,c in short.items() if not c['met']}
    assert lost=={'success as served', 'better than each rival as served', f'rare rule ({bench.RARE.split(":")[0]}', 'the demo takes at most 8 CPU minutes'}
    assert all(c['seeds']['0']['met'] for c in short.values()), 'one seed that fails is enough, and is named'

def test_plentiful_logs_ask_the_other_way_round(bench):
    (enough,), (not_enough,) = (bench.judge([record(bench, 'plentiful logs', equal=e)]) for e in (.95, .8))
    assert enough['met'] and not not_enough['met']
    doc = {'mode': 'full', 'records': [record(bench, 'plentiful logs', equal=.8)], 'checks': [not_enough]}
    assert 'these figures do not show it' in bench.markdown(doc)

def test_seeds_are_merged_and_stale_results_dropped(bench, tmp_path, capsys):
    for r in (record(bench), record(bench, seed=2, trained=.6), record(bench, 'plentiful logs', equal=.95)): bench.write(bench.collect('full', [r], tmp_path), tmp_path)
    doc = json.loads((tmp_path/'support_desk.json').read_text())
    assert [(r['setting'], r['seed']) for r in doc['records']]==[('few logs', 0), ('few logs', 2), ('plentiful logs', 0)]
    page = (tmp_path/'support_desk.md').read_text()
    assert '**NOT met**' in page and 'Here filtering the logs is enough' in page and (tmp_path/'support_desk.png').stat().st_size > 10_000
    doc['records'][0]['settings']['logs'] = 1
    (tmp_path/'support_desk.json').write_text(json.dumps(doc))
    left = bench.collect('full', [record(bench, seed=1)], tmp_path)['records']
    assert [r['seed'] for r in left if r['setting']=='few logs']==[1, 2] and 'dropped' in capsys.readouterr().out

def test_the_quick_modes_are_smaller_than_the_demo(bench):
    full, quick, smoke = (bench.settings(m, 'few logs', 0) for m in ('full', 'quick', 'smoke'))
    assert smoke.clone.steps < quick.clone.steps < full.clone.steps and quick.training.num_episodes < full.training.num_episodes
    assert full==bench.ImproveConfig() and bench.settings('full', 'plentiful logs', 0).logs==20_000

# --- the engine beside TRL

@pytest.fixture(scope='module')
def engine():
    if not all(map(importlib.util.find_spec, ('trl', 'datasets'))): lacking('trl is not here: `pip install -c constraints.txt trl` runs the bench beside it')
    return load('engine')

def test_the_engines_bench_runs_and_all_sides_do_the_same_work(engine, tmp_path):
    "Tiny settings, in a process of its own; it stops by itself where the sides sample different numbers of tokens."
    wanted = ['step 64+64', 'step 4 turns', 'training', 'rollout']
    done = subprocess.run([sys.executable, engine.__file__, '--smoke', '--results', tmp_path, *(a for c in wanted for a in ('--case', c))], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert not done.returncode, done.stderr[-3000:]
    records = json.loads((tmp_path/'engine.json').read_text())
    assert [r['case'] for r in records]==[k for k in engine.cases('smoke') if k.startswith(tuple(wanted))]
    for r in records: assert {'case', 'ours', 'peer', 'unit', 'ratio', 'goal', 'met', 'spread', 'versions'} <= r.keys() and r['ratio'] > 0 and r['met']==(r['spread']['peer']['median']/r['spread']['ours']['median'] >= r['goal'])
    apart = {r['case']: r.get('same_update', r.get('gradient_error')) for r in records}
    assert all(v < 1e-4 for k,v in apart.items() if not k.startswith('rollout')), apart
    page = (tmp_path/'engine.md').read_text()
    assert '| case |' in page and (tmp_path/'engine.png').stat().st_size > 10_000

def test_a_case_of_the_engine_replaces_its_old_figures_and_keeps_the_others(engine, tmp_path):
    def line(case, ours, goal=3., mode='full'): return engine.record(case, {'ours': [ours]*3, 'peer': [2.]*3}, goal) | {'mode': mode}
    engine.write([line('step 64+64, 0.66M', .5), line('rollout 4 turns, 0.66M', .5)], 'full', tmp_path)
    both = engine.write([line('step 64+64, 0.66M', 1.)], 'full', tmp_path)
    assert [(r['case'], r['ratio'], r['met']) for r in both]==[('step 64+64, 0.66M', 2., False), ('rollout 4 turns, 0.66M', 4., True)]
    page = (tmp_path/'engine.md').read_text()
    assert '**NOT met**' in page and 'falls short of the goal of 3x' in page
    assert [r['case'] for r in engine.write([line('training 512+64, group 8, 0.66M', .5, mode='quick')], 'quick', tmp_path)]==['training 512+64, group 8, 0.66M'], 'results of another mode are not mixed in'

def test_the_model_of_the_engines_bench_says_what_it_should(engine):
    "A call of a given length, in another wording each time; and nothing that ends."
    import torch
    w = engine.Work((16, 1), P=2, G=2, prompt=232, length=10, turns=3)
    ts = [t for g in engine.Ours(w).play() for t in g.trajectories]
    assert all([hi-lo for lo,hi in t.segments[0].turn_spans]==[10]*3 and len(t.segments)==1 and len(t.segments[0].ids)==232+3*10+2*22 for t in ts)
    said = [m.tool_calls[0].arguments for t in ts for m in t.messages if m.role=='assistant']
    assert len(set(said)) > len(said)/2
    tok = w.tokenizer()
    with torch.no_grad(): p = engine.model_of((16, 1), tok)(input_ids=torch.randint(2000, (4, 50))).logits.softmax(-1)
    assert p[..., tok.eos_token_id].max()==0

def test_the_bench_of_labelling_measures_a_sound_queue(tmp_path):
    from stateset_nb.labelling import LabelQueue, label_events, standing, standing_labels
    from stateset_nb.store import TrainingStore
    m = load('labelling')
    records = m.measure(f'sqlite:///{tmp_path}/{{n}}.db', [60, 90], 2, 5, 'SQLite')
    assert all(r['calls'][k]['n'] >= 1 for r in records for k in m.CALLS)
    assert '| label + upcoming |' in m.page({'records': records, 'machine': 'x', 'load': 0.})
    with TrainingStore(f'sqlite:///{tmp_path}/90.db') as s:
        q = LabelQueue(s, 'bench', 'ann')
        log = standing(label_events(q))
        assert {e.id for e in standing_labels(q)} == {e.id for e in log.values() if e.kind == 'label'} and q.progress().team == len(standing_labels(q))
