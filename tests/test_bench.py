"""The bench of the demo: what it calls met, what it merges, and what it writes. It is not run here."""
import importlib.util, json
from pathlib import Path
import pytest

@pytest.fixture(scope='module')
def bench():
    spec = importlib.util.spec_from_file_location('support_desk_bench', Path(__file__).parent.parent/'benchmarks'/'support_desk.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

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
