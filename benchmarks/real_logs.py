"""`improve` on logs that people and a real agent left: does the path from a JSONL file to a verdict hold, and what does it say?

    python benchmarks/real_logs.py                   # needs ../shared/data; skipped with one line where it is absent
    python benchmarks/real_logs.py --data FOLDER     # the data elsewhere

The sample mixes two sources into one file in the OpenAI chat format, written to runs/ and never committed:
- conversations of an airline's support agent (GPT-4o on tau-bench) with tool calls and a rating, 1 where the task was solved;
- dialogues with an assistant that people preferred (the helpful part of hh-rlhf), without ratings.
A tiny policy is cloned from them; single-turn GRPO practises on prompts taken from them, paid by word rules; the judge, overlap with
what was really answered, was never trained on. It is run twice from the same clone: with the demo's bold practice, and gently (a fifth
of the learning rate, and held near the clone). A tiny model does not come to talk sense on such logs; what is tested is the path.
"""
import argparse, asyncio, json, platform, shutil, time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from stateset_nb.core import read_conversations, read_jsonl, stream, write_jsonl, write_text
from stateset_nb.flywheel import ImproveConfig, improve, log_scenarios
from stateset_nb.policy import TinyConfig
from stateset_nb.trainers import TrainingConfig, TrainingProfile

HERE = Path(__file__).parent
DATA = HERE.parent.parent / 'shared' / 'data'
AIRLINE, ASSISTANT = Path('tau_bench/airline/trajectories_gpt4o.jsonl'), Path('hh_rlhf_test/pairs.jsonl')
PRACTICE = {'bold': {}, 'gentle': {'learning_rate': 1e-4, 'beta': .05}}  # what differs from TrainingProfile.TINY

def absent(data: Path) -> list[str]: return [str(f) for f in (AIRLINE, ASSISTANT) if not (data / f).is_file()]

def sample(data: Path, airline: int, assistant: int) -> list[dict]:
    "Log lines: `messages`, a `group` that a split keeps together, and a `rating` where there is one; the same at each call."
    draw = lambda rows, n: sorted(rows, key=lambda r: stream('real logs', json.dumps(r, sort_keys=True)))[:n]
    a = [{'messages': d['messages'], 'rating': d['reward'], 'group': f'airline task {d["task_id"]}', 'source': 'airline'} for _, d in read_jsonl(data / AIRLINE)]
    b = [{'messages': [*d['messages'], {'role': 'assistant', 'content': d['chosen']}], 'group': d['group'], 'source': 'assistant'} for _, d in read_jsonl(data / ASSISTANT) if d['subset'] == 'helpful-base']
    return draw(a, airline) + draw(b, assistant)

def describe(path: Path) -> dict:
    "What the file holds."
    talks = read_conversations(path)
    train, test, kept = log_scenarios(talks)
    return {'conversations': len(talks), 'rated': sum(t.rating is not None for t in talks), 'roles': dict(Counter(m.role for t in talks for m in t.messages)),
            'tool_calls': sum(len(m.tool_calls) for t in talks for m in t.messages), 'longest_messages': max(len(t.messages) for t in talks),
            'longest_characters': max(sum(len(m.text) for m in t.messages) for t in talks), 'prompts_to_practise_on': len(train), 'prompts_held_out': len(test), 'learnt_from': len(kept)}

def config(logs: Path, out: Path, how: str, small: bool = False) -> ImproveConfig:
    "Small settings; `small` for a test of the path in seconds."
    few = dict(num_episodes=2, prompts_per_step=4, num_generations=4, max_completion_length=16) if small else dict(num_episodes=25, prompts_per_step=8, max_completion_length=96)
    tiny = TinyConfig(steps=8, hidden_size=32, layers=1, max_tokens=512) if small else TinyConfig(steps=300, max_tokens=1024)
    return ImproveConfig(conversations=str(logs), out=str(out), scenarios=12 if small else 120, clone=tiny, training=TrainingConfig.from_profile(TrainingProfile.TINY, **few, **PRACTICE[how]))

def run(logs: Path, work: Path, small: bool = False) -> list[dict]:
    "Both ways of practising, from one clone."
    res, first = [], None
    for how in PRACTICE:
        c = config(logs, work / how, how, small)
        if first is not None and not (work / how / 'clone').is_dir(): shutil.copytree(first / 'clone', work / how / 'clone')
        print(f'== {how} practice: {c.out}', flush=True)
        done = asyncio.run(improve(c, resume=True))
        first = first or done.folder
        metrics = [json.loads(l) for l in (done.folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
        keys = ('reward', 'entropy', 'completions/clipped_ratio', 'completions/mean_length')
        res.append({'how': how, 'verdict': {k: v for k, v in done.verdict.items() if k != 'comparisons'}, 'comparisons': done.verdict['comparisons'],
                    'first_round': {k: round(metrics[0].get(k, 0), 3) for k in keys}, 'last_round': {k: round(metrics[-1].get(k, 0), 3) for k in keys},
                    'success_is': 'an overlap of at least one half', 'seconds': json.loads((done.folder / 'run.json').read_text())['seconds'], 'examples': examples(done)})
    return res

def examples(done, n: int = 3) -> list[dict]:
    "Some held-out prompts with the answers before and after, taken as they come."
    metric, after = done.verdict['metric'], {r.scenario_id: r for r in done.tests['trained served'].results}
    res = []
    for r in done.tests['clone served'].results[:n]:
        both = [r, after[r.scenario_id]]
        at = max(i for i, m in enumerate(r.trajectory.messages) if m.role == 'assistant')
        before, later = (x.trajectory.messages[at].text[:300] or '(no text)' for x in both)
        res.append({'asked': r.trajectory.messages[at - 1].text[-200:], 'before': before, 'after': later, 'overlap': [round(x.metrics[metric], 3) for x in both]})
    return res

def cell(text: object) -> str: return str(text).replace('|', '\\|').replace('\n', ' ')

def table(head, rows) -> str: return '\n'.join('| ' + ' | '.join(map(cell, r)) + ' |' for r in [head, ['---'] * len(head), *rows])

MEANING = {'better': 'the answers came closer to what was really said', 'worse': 'practice did harm, and the report says not to release it', 'not_worse': 'a loss of the margin is ruled out and a gain is not shown',
           'inconclusive': 'the held-out prompts are too few to tell a gain from a loss of the margin: no pass and no failure'}

def markdown(doc: dict) -> str:
    "The results as a page."
    s, parts = doc['sample'], []
    for r in doc['runs']:
        v = r['verdict']
        parts += [f'## {r["how"].capitalize()} practice', f'{v["sentence"]} That is, {MEANING[v["verdict"]]}.',
                  f'Paid by word rules, the reward went from {r["first_round"]["reward"]:.2f} to {r["last_round"]["reward"]:.2f}; entropy from {r["first_round"]["entropy"]:.2f} to {r["last_round"]["entropy"]:.2f} nats a token; '
                  f'answers cut at the token limit from {r["first_round"]["completions/clipped_ratio"]:.0%} to {r["last_round"]["completions/clipped_ratio"]:.0%}.',
                  table(['before', 'after', 'difference', '95 % interval', 'verdict'], [(p['before_is'], p['after_is'], f'{p["difference"]:+.4f}', f'{p["low"]:+.4f} to {p["high"]:+.4f}', p['verdict'].replace('_', ' ')) for p in r['comparisons']]),
                  table(['asked', 'before (served)', 'after (served)', 'overlap'], [(e['asked'], e['before'], e['after'], '{} → {}'.format(*e['overlap'])) for e in r['examples']]),
                  'Seconds: ' + ', '.join(f'{k} {v:.0f}' for k, v in r['seconds'].items()) + '.']
    left = doc['runs'][0]['verdict']['checks']
    return '\n\n'.join(['# Real logs through `improve`', f'{s["conversations"]} conversations ({s["rated"]} rated, {s["tool_calls"]} tool calls, the longest of {s["longest_messages"]} messages and {s["longest_characters"]} characters). '
        f'{s["learnt_from"]} are learnt from, {s["prompts_to_practise_on"]} prompts are practised on and {s["prompts_held_out"]} held out; {left["too_long"]} prompts are too long for the context and left out.',
        'The policy is tiny and made on the spot: it does not come to answer sensibly, as the examples show. What is tested is the path, and whether the verdict says plainly what practice did. '
        'Overlap of words is a coarse judge, too: babble that is longer can score above a short reply. Read the answers before you believe a figure.', *parts,
        '## Made with', f'{doc["date"]}; {doc["threads"]} threads; ' + ', '.join(f'{k} {v}' for k, v in doc['versions'].items()) + '. Data: tau-bench (MIT) and hh-rlhf (MIT). Made by `benchmarks/real_logs.py`.']) + '\n'

def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', type=Path, default=DATA, help='folder with tau_bench and hh_rlhf_test')
    p.add_argument('--work', type=Path, default=HERE.parent / 'runs' / 'real_logs', help='where sample and runs are kept')
    p.add_argument('--results', type=Path, default=HERE / 'results')
    p.add_argument('--small', action='store_true', help='seconds instead of minutes: does the path hold?')
    a = p.parse_args()
    if missing := absent(a.data): return print(f'skipped: {", ".join(missing)} not found in {a.data} — give the folder with --data')
    work = a.work / ('small' if a.small else 'full')
    logs = write_jsonl(work / 'logs.jsonl', sample(a.data, *((30, 60) if a.small else (200, 200))))
    doc = {'schema': 1, 'benchmark': 'real_logs', 'date': time.strftime('%Y-%m-%d'), 'threads': torch.get_num_threads(), 'sample': describe(logs),
           'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__},
           'settings': replace(config(logs, work, 'bold', a.small), conversations='logs.jsonl', out='').to_dict(), 'gentle': PRACTICE['gentle'], 'runs': run(logs, work, a.small)}
    results = a.results / 'tmp' if a.small else a.results
    write_text(results / 'real_logs.json', json.dumps(doc, indent=1, ensure_ascii=False))
    write_text(results / 'real_logs.md', markdown(doc))
    for r in doc['runs']: print(f'{r["how"]}: {r["verdict"]["sentence"]}')
    print(f'{results}/real_logs.json, .md; reports in {work}')

if __name__ == '__main__': main()
