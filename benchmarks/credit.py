"""Credit over turns: which way of giving it learns the support desk faster, over seeds.

    python benchmarks/credit.py            # every credit, every seed; results are merged with those that are there
    python benchmarks/credit.py --seeds 0 --credits outcome turn
    python benchmarks/credit.py --smoke    # tiny settings: does it run at all?

All credits of a seed start from the same clone of the demo's logs and practise on the same scenarios, 70 rounds of one update each at TrainingProfile.TINY;
only `turn_credit` (and what belongs to it) differs. *Area* is the mean success over all rounds of practice: one that learns faster has more of it. Held-out success is
that of 200 scenarios nobody practised on, sampled at temperature 1. Beside them stands the demo's own practice, which is fewer and bolder rounds. Results: benchmarks/results/credit.{json,md,png}.
"""
import argparse, asyncio, json, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import support_desk
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
from stateset_nb.core import stream, write_text
from stateset_nb.environments import SupportDesk, desk_scenarios, support_desk_logs
from stateset_nb.flywheel import ImproveConfig, policy_results
from stateset_nb.policy import load_policy, save_policy, tiny_policy
from stateset_nb.trainers import MultiTurnGRPOTrainer, TrainingConfig, TrainingProfile

HERE = Path(__file__).parent
CREDITS = {'outcome': {}, 'turn': {}, 'turn, 0.95 a turn': {'turn_credit': 'turn', 'gamma': .95}, 'anchor': {'gamma': .95}, 'gae': {}}
DEMO = "the demo's practice"

def settings(smoke: bool, seed: int) -> ImproveConfig: return support_desk.settings('smoke' if smoke else 'full', 'few logs', seed)

def practice_of(c: ImproveConfig, credit: str, smoke: bool) -> TrainingConfig:
    "How one of the ways practises."
    if credit == DEMO: return replace(c.training, seed=c.seed, save_steps=0)
    given = {'turn_credit': credit, 'seed': c.seed, 'save_steps': 0} | CREDITS[credit]
    return replace(c.training, **given) if smoke else TrainingConfig.from_profile(TrainingProfile.TINY, num_episodes=70, **given)

async def practise(c: ImproveConfig, start: Path, config: TrainingConfig) -> dict:
    "One run of practice: success of each round, and on held-out scenarios."
    policy = load_policy(start, 'cpu')
    train = desk_scenarios(c.practice, stream(c.seed, 'practice'))  # the demo's
    trainer = MultiTurnGRPOTrainer(Agent(AgentConfig('tiny'), PolicyBackend(policy)), SupportDesk(), None, config, scenarios=train)
    began = time.process_time()
    log = [m async for m in trainer.steps()]
    seconds = time.process_time() - began
    held = desk_scenarios(c.scenarios, stream(c.seed, 'test'), 'test')
    test = await policy_results(policy, 'practised', SupportDesk(), held, 1., config.max_completion_length, stream(c.seed, 'test'))
    return {'success': [round(m['success'], 4) for m in log], 'reward': [round(m['reward'], 4) for m in log], 'entropy': [round(m['entropy'], 4) for m in log],
            'held_out': support_desk.interval(test.success), 'cpu_s': round(seconds, 1)}

def measure(args) -> list[dict]:
    "Runs that are not there yet, each written as soon as it is done."
    out = HERE / 'results' / ('tmp' if args.smoke else '') / 'credit.json'
    records = json.loads(out.read_text()) if out.is_file() else []
    for seed in args.seeds:
        c = settings(args.smoke, seed)
        start = Path(args.work) / f'{"smoke" if args.smoke else "full"}-{seed}'
        if not start.is_dir(): save_policy(tiny_policy(support_desk_logs(c.logs, seed), seed, c.clone, cache=False, progress=True), start)
        for credit in args.credits:
            if any((r['seed'], r['credit']) == (seed, credit) for r in records): continue
            records.append({'schema': 1, 'seed': seed, 'credit': credit, 'settings': (config := practice_of(c, credit, args.smoke)).to_dict(), 'machine': support_desk.machine(), 'versions': support_desk.versions(), 'threads': torch.get_num_threads()}
                           | asyncio.run(practise(c, start, config)))
            print(seed, credit, 'area', round(float(np.mean(records[-1]['success'])), 3), 'held out', records[-1]['held_out'], records[-1]['cpu_s'], 's', flush=True)
            write_text(out, json.dumps(records, indent=1))
    return records

def rounds_to(success: list[float], level: float = .9) -> int | None:
    "The first round from which the mean of five rounds is at this level."
    smooth = np.convolve(success, np.ones(5) / 5, 'valid') if len(success) >= 5 else np.array([])
    at = np.flatnonzero(smooth >= level)
    return int(at[0]) + 3 if len(at) else None

def report(records: list[dict], out: Path) -> None:
    "The page and the picture."
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    names = [k for k in CREDITS if any(r['credit'] == k for r in records)]
    of = lambda k: sorted((r for r in records if r['credit'] == k), key=lambda r: r['seed'])
    area = lambda r: float(np.mean(r['success']))
    base = {r['seed']: area(r) for r in of('outcome')}
    rows = []
    for k in names:
        rs, gaps = of(k), [100 * (area(r) - base[r['seed']]) for r in of(k) if r['seed'] in base]
        rows.append([k, len(rs), ' / '.join(f'{100 * area(r):.1f}' for r in rs), f'{np.mean(gaps):+.1f}' if gaps and k != 'outcome' else '-', ' / '.join(f'{g:+.1f}' for g in gaps) if k != 'outcome' else '-',
                     ' / '.join(str(rounds_to(r['success']) or '-') for r in rs), ' / '.join(f'{100 * r["held_out"]["value"]:.1f}' for r in rs), ' / '.join(f'{r["cpu_s"]:.0f}' for r in rs)])
    head = ['turn_credit', 'seeds', 'area (mean success of all rounds, %)', 'area against outcome, points', 'seed by seed', 'round at which five rounds have 90 %', 'held out, sampled, %', 'CPU seconds']
    text = ['# Credit over turns', '', ' '.join(__doc__.split('\n\n')[2].split()), '', support_desk.table(head, rows), '', *demo(of('outcome'), of(DEMO)), f'Seeds {", ".join(map(str, sorted({r["seed"] for r in records})))}. ' + about(records)]
    write_text(out.with_suffix('.md'), '\n'.join(text) + '\n')
    everybodys = set.intersection(*({r['seed'] for r in of(k)} for k in names))  # means over other seeds could not be compared
    fig, ax = plt.subplots(figsize=(7, 4))
    for i, k in enumerate(names):
        curves = np.array([np.convolve(r['success'], np.ones(5) / 5, 'valid') for r in of(k) if len(r['success']) >= 5 and r['seed'] in everybodys])
        if not len(curves): continue
        x = np.arange(curves.shape[1]) + 3
        ax.plot(x, 100 * curves.mean(0), f'C{i}', label=k); ax.fill_between(x, 100 * curves.min(0), 100 * curves.max(0), color=f'C{i}', alpha=.15, lw=0)
    ax.set(xlabel='round of practice', ylabel='success in practice (%), mean of five rounds', title=f'Credit over turns on the support desk, seeds {", ".join(map(str, sorted(everybodys)))} (band: least to most)'); ax.legend(loc='lower right')
    fig.tight_layout(); fig.savefig(out.with_suffix('.png'), dpi=120); plt.close(fig)

def demo(plain: list[dict], bold: list[dict]) -> list[str]:
    "The demo's own practice beside the 70 rounds, seed by seed."
    if not (plain and bold): return []
    t, n, rows = bold[0]['settings'], plain[0]['settings']['num_episodes'], []
    for a, b in ((a, b) for b in bold for a in plain if a['seed'] == b['seed']):
        rows.append([b['seed'], *(f'{100 * r["held_out"]["value"]:.1f} [{100 * r["held_out"]["low"]:.0f}, {100 * r["held_out"]["high"]:.0f}]' for r in (a, b)), f'{a["cpu_s"]:.0f}', f'{b["cpu_s"]:.0f}'])
    return ['## Fewer and bolder rounds', '', f"The demo's practice: {t['num_episodes']} rounds, {t['num_iterations']} updates on each, learning rate {t['learning_rate']:g}; credit '{t['turn_credit']}'. From the same clones as above.", '',
            support_desk.table(['seed', f'held out after the {n} rounds above, sampled, %', "after the demo's practice", f'CPU seconds of the {n}', "of the demo's"], rows), '']

def about(records: list[dict]) -> str:
    r = records[0]
    return f'{r["machine"]["cpu"]}, {r["threads"]} thread(s), ' + ', '.join(f'{k} {v}' for k, v in r['versions'].items()) + '.'

def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2]); p.add_argument('--credits', nargs='+', default=[*CREDITS, DEMO], choices=[*CREDITS, DEMO])
    p.add_argument('--smoke', action='store_true'); p.add_argument('--work', default='runs/credit', help='where clones are kept')
    args = p.parse_args()
    records = measure(args)
    report(records, HERE / 'results' / ('tmp' if args.smoke else '') / 'credit.json')

if __name__ == '__main__': main()
