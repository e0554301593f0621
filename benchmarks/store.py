"""The store at size: how fast do conversations come in and go out, and does memory stay flat?

    python benchmarks/store.py                  # 10,000 and 100,000 examples in SQLite (long)
    python benchmarks/store.py --quick          # 2,000 and 10,000, for a look
    python benchmarks/store.py --url postgresql://user@host/empty_database    # a server beside it; its tables are dropped afterwards

Each conversation is about 3.4 kB of JSON: a system prompt, six turns with two calls of tools, and a customer's record with personal data in what a tool returns.
Every phase is a process of its own over the same file, so that its peak memory is its own; `base` is what the process holds once everything is imported.
*Ingest* reads JSONL, redacts, hashes and commits 500 a transaction; *as it came* is the same without redaction, and *again* goes over that file once more, of which nothing is new.
*Export* writes one training file; *read* makes an object of every example. *Rating* is one `add_feedback`, from the call to the commit on disk, while nobody else writes.
The full bench writes benchmarks/results/store.{json,md}; --quick writes to benchmarks/results/tmp.
"""
import argparse, json, os, platform, random, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import sqlalchemy as sa

import stateset_nb
from stateset_nb.core import Feedback, write_text
from stateset_nb.store import TrainingStore, add_feedback, export_file, ingest_file

HERE = Path(__file__).parent
FIRST, LAST = 'Mei Omar Zoe Ivan Lucia Noah Amina Chen'.split(), 'Davis Haddad Klein Petrov Rossi Jensen Diallo Wang'.split()
PHASES = ('ingest', 'as it came', 'again', 'read', *(f'export {k}' for k in ('trl', 'openai', 'stateset')), 'rating')
RAW = ('as it came', 'again')

def conversation(i: int) -> dict:
    "One talk of a support desk, another one for each number."
    r = random.Random(i)
    first, last, order = r.choice(FIRST), r.choice(LAST), f'W{r.randrange(10**7):07}'
    mail, street = f'{first}.{last}{r.randrange(99)}@example.com'.lower(), f'{r.randrange(1, 999)} Oak Street'
    words = ' '.join(r.choices('the parcel arrived late and one of the items was broken so please check what can be done about it before the weekend'.split(), k=60))
    record = {'name': {'first_name': first, 'last_name': last}, 'email': mail, 'address': {'address1': street, 'city': 'Denver', 'zip': f'{r.randrange(10000, 99999)}'}, 'orders': [order]}
    items = [{'name': w, 'product_id': str(r.randrange(10**9, 10**10)), 'price': r.randrange(500, 9000) / 100, 'options': {'colour': 'blue', 'size': 'M'}} for w in ('Kettle', 'Lamp', 'Backpack', 'Desk Chair')]
    call = lambda k, name, **a: {'role': 'assistant', 'content': None, 'tool_calls': [{'id': f'c{k}', 'type': 'function', 'function': {'name': name, 'arguments': json.dumps(a)}}]}
    return {'id': f'c{i:07}', 'agent': 'desk', 'model': 'm1', 'rating': 1 + i % 5, 'timestamp': f'2026-01-{1 + i % 28:02}T12:00:00Z', 'messages': [
        {'role': 'system', 'content': 'You are the support agent of a shop. ' + 'Look the customer up before you act, say what you are about to do, and ask before money is moved. ' * 6},
        {'role': 'user', 'content': f'Hello, my name is {first} {last} and I write about order {order}: {words}.'}, call(1, 'find_customer', first_name=first, last_name=last, email=mail),
        {'role': 'tool', 'tool_call_id': 'c1', 'content': json.dumps(record)}, call(2, 'get_order', order_id=order),
        {'role': 'tool', 'tool_call_id': 'c2', 'content': json.dumps({'order_id': order, 'status': 'delivered', 'items': items, 'ship_to': record['address']})},
        {'role': 'assistant', 'content': f'Thank you, {first}. I see order {order}, delivered to {street}. Shall I refund the {items[i % 4]["name"]} or send a new one?'},
        {'role': 'user', 'content': f'A new one, please. {words}.'}, {'role': 'assistant', 'content': f'It is on its way to {street}, {first}; you get a mail at {mail} when it leaves. Case {i}.'}]}

def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == 'darwin' else 10))

def phase(name: str, url: str, file: str, n: int) -> dict:
    "One phase, in a process of its own."
    base, cpu, t0 = peak(), time.process_time(), time.perf_counter()
    with TrainingStore(url, **({'redactor': None} if name in RAW else {})) as store:
        if name in ('ingest', 'again', 'as it came'):
            r = ingest_file(store, file)
            assert (r.known if name == 'again' else r.added) == r.read == n, r
        elif name == 'read': assert sum(1 for _ in store.examples()) == n
        elif name == 'rating':
            times = []
            for i in range(300):
                t = time.perf_counter()
                add_feedback(store, Feedback(f'c{i:07}', 1 + i % 5, labeller='ann', comment='right, but slow'))
                times.append((time.perf_counter() - t) * 1e3)
            return {'phase': name, 'ms p50': statistics.median(times), 'ms p99': sorted(times)[int(.99 * len(times))], 'rows': 300, 'cpu': time.process_time() - cpu, 'wall': time.perf_counter() - t0}
        else:
            with tempfile.TemporaryDirectory() as tmp: assert export_file(store, f'{tmp}/out.jsonl', name.split()[1]).rows == n
    return {'phase': name, 'rows': n, 'wall': time.perf_counter() - t0, 'cpu': time.process_time() - cpu, 'base': base, 'peak': peak()}

def bench(n: int, url: str | None, folder: Path) -> list[dict]:
    "Every phase at one size."
    file = write_text(folder / f'{n}.jsonl', (json.dumps(conversation(i)) + '\n' for i in range(n)))
    kind, res = 'PostgreSQL' if url else 'SQLite', []
    def one(name: str, at: str) -> None:
        done = subprocess.run([sys.executable, __file__, '--phase', name, '--url', at, '--file', str(file), '--size', str(n)], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        if done.returncode: raise SystemExit(done.stderr)
        res.append(json.loads(done.stdout.splitlines()[-1]) | {'database': kind, 'size': n})
        print(kind, n, res[-1], flush=True)
    for name in PHASES:
        if name not in RAW: one(name, url or f'sqlite:///{folder}/{n}.db')
        elif not url: one(name, f'sqlite:///{folder}/{n}-raw.db')
    if url:
        with sa.create_engine(url.replace('postgresql://', 'postgresql+psycopg://')).begin() as c: c.exec_driver_sql('DROP TABLE feedback, preference, setting, example, schema_version')
    else: res[-1]['file'] = (folder / f'{n}.db').stat().st_size / 1e6
    return [r | {'kB': file.stat().st_size / n / 1e3} for r in res]

def table(records: list[dict], setting: str) -> str:
    "The figures as Markdown."
    rows = ['| database | examples | phase | rows/s | rows per CPU second | peak memory, MB | of that imports, MB |', '| --- | --- | --- | --- | --- | --- | --- |']
    for r in records:
        if r['phase'] != 'rating': rows.append(f"| {r['database']} | {r['size']:,} | {r['phase']} | {r['rows']/r['wall']:,.0f} | {r['rows']/r['cpu']:,.0f} | {r['peak']:.0f} | {r['base']:.0f} |")
    said = [f"- {r['database']}, {r['size']:,} examples: a rating is on disk after {r['ms p50']:.1f} ms (median of {r['rows']}; p99 {r['ms p99']:.1f} ms)" + (f"; the file has {r['file']:,.0f} MB." if 'file' in r else '.') for r in records if r['phase'] == 'rating']
    by = {(r['database'], r['phase'], r['size']): r for r in records if 'peak' in r}
    sizes = sorted({r['size'] for r in records})
    flat = [f"- {d}, {p}: {by[d, p, sizes[-1]]['peak'] - by[d, p, sizes[0]]['peak']:+.0f} MB at {sizes[-1]:,} beside {sizes[0]:,}." for d, p, s in by if s == sizes[0] and len(sizes) > 1]
    return '\n'.join(['# The store at size', '', f'Conversations of {records[0]["kB"]:.1f} kB, one process a phase. What each phase does: benchmarks/store.py. Rates are of a shared machine; those per CPU second are steadier.', '',
                      *rows, '', '## One rating', '', *said, '', '## Memory as data grow', '', *flat, '', setting, ''])

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--quick', action='store_true')
    ap.add_argument('--sizes', type=int, nargs='+')
    ap.add_argument('--url')
    ap.add_argument('--only-url', action='store_true', help='the server alone')
    ap.add_argument('--results', type=Path)
    for a in ('--phase', '--file'): ap.add_argument(a, help=argparse.SUPPRESS)
    ap.add_argument('--size', type=int, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.phase: return print(json.dumps(phase(a.phase, a.url, a.file, a.size)))
    sizes, out = a.sizes or ((2000, 10000) if a.quick else (10000, 100000)), a.results or HERE / 'results' / ('tmp' if a.quick else '')
    setting = f'{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, python {platform.python_version()}, SQLAlchemy {sa.__version__}, stateset_nb {stateset_nb.__version__}.'
    with tempfile.TemporaryDirectory() as tmp:
        for url in ([None] if not a.only_url else []) + ([a.url] if a.url else []):
            for n in sizes: report(bench(n, url, Path(tmp)), out, setting)
    print((out / 'store.md').read_text())

def report(new: list[dict], out: Path, setting: str) -> None:
    "Write the figures, in place of older ones of the same database and size."
    kept = json.loads((out / 'store.json').read_text())['records'] if (out / 'store.json').is_file() else []
    mine = {(r['database'], r['size']) for r in new}
    records = sorted([r for r in kept if (r['database'], r['size']) not in mine] + new, key=lambda r: (r['database'] != 'SQLite', r['size']))
    write_text(out / 'store.json', json.dumps({'records': records, 'setting': setting}, indent=1))
    write_text(out / 'store.md', table(records, setting))

if __name__ == '__main__': main()
