"""The house: notebooks in one street, imports that point down it, small documented parts, and a light front door."""
import ast, io, json, re, subprocess, sys, tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).parent.parent
PKG = 'stateset_nb'
BOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
EXPORT = re.compile(r'^#\|\s*(export|exports|exporti)\b', re.M)
DEF = (ast.FunctionDef, ast.AsyncFunctionDef)
each_book = pytest.mark.parametrize('book', BOOKS, ids=lambda f: f.stem)

@cache
def cells(book):
    "(kind, source, has outputs) of each cell that is not empty."
    found = ((c['cell_type'], ''.join(c['source']), bool(c.get('outputs'))) for c in json.loads(book.read_text(encoding='utf-8'))['cells'])
    return [c for c in found if c[1].strip()]

def room(book): return next(m[1] for _,s,_ in cells(book) if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M)))

ROOMS = [room(b) for b in BOOKS]

@cache
def module(book): return (ROOT/PKG/f'{room(book)}.py').read_text(encoding='utf-8')

@cache
def tree(book): return ast.parse(module(book))

def public(body): return [n for n in body if isinstance(n, (*DEF, ast.ClassDef)) and n.name[0]!='_']

def own_imports(book):
    "The rooms that a module imports, anywhere in it."
    for n in ast.walk(tree(book)):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').split('.')[0]==PKG):
            path = (n.module or '').removeprefix(PKG).strip('.')
            yield from [path.split('.')[0]] if path else [a.name for a in n.names]
        elif isinstance(n, ast.Import): yield from (a.name.split('.')[1] for a in n.names if a.name.startswith(PKG+'.'))

@each_book
def test_imports_point_down_the_street(book):
    "A room knows only rooms with smaller numbers, so there are no circles."
    here = ROOMS.index(room(book))
    up = [r for r in own_imports(book) if r not in ROOMS[:here]]
    assert not up, f'{room(book)} imports {up}, which stand at or above it'

@pytest.mark.parametrize('book', [b for b in BOOKS if room(b)!='cli'], ids=lambda f: f.stem)
def test_own_imports_are_not_hidden_in_functions(book):
    "The command line alone loads a room when a command asks for it."
    hidden = [ast.unparse(n) for f in ast.walk(tree(book)) if isinstance(f, DEF) for n in ast.walk(f) if isinstance(n, ast.ImportFrom) and n.level]
    assert not hidden

def test_each_module_has_one_notebook():
    assert len(ROOMS)==len(set(ROOMS))
    assert {f.stem for f in (ROOT/PKG).glob('*.py')} == {'__init__', '_modidx', *ROOMS}

@each_book
def test_functions_are_short(book):
    long = {n.name:n.end_lineno-n.lineno+1 for n in ast.walk(tree(book)) if isinstance(n, DEF) and n.end_lineno-n.lineno>=60}
    assert not long, 'a function has at most 60 lines'

def test_public_names_are_unique():
    homes = defaultdict(list)
    for b in BOOKS:
        for n in public(tree(b).body): homes[n.name].append(room(b))
    assert not {n:h for n,h in homes.items() if len(h)>1}
    assert not homes.keys() & set(ROOMS), 'a public name equals the name of a module'
    assert not [n for n in homes if n.startswith('test_')], 'pytest takes such a function for a test wherever it is imported'

# Docments: a docstring, each parameter on a line of its own with a comment, and a word about what a function returns.

def comments(source):
    "The lines that hold a comment."
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type==tokenize.COMMENT}

def names_of(decorators): return {ast.unparse(d).split('(')[0].split('.')[-1] for d in decorators}

def check_function(f, said, where, returns=True):
    "What a function lacks."
    a = f.args
    params = [p for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if p is not None and p.arg not in ('self', 'cls')]
    lines = [p.lineno for p in params]
    if not ast.get_docstring(f): yield f'{where} has no docstring'
    if len(lines)!=len(set(lines)): yield f'{where} has two parameters on one line'
    else: yield from (f'{where}({p.arg}) has no comment' for p in params if not said & set(range(p.lineno, p.end_lineno+1)))
    silent = f.returns is None or ast.unparse(f.returns) in ('None', 'Self', 'NoReturn')
    signature_end = {*range(f.returns.lineno, f.body[0].lineno)} if f.returns is not None else set()
    if returns and not silent and not said & signature_end: yield f'{where} does not say what it returns'

def is_plain(value): return isinstance(value, ast.AnnAssign) and isinstance(value.target, ast.Name) and 'ClassVar' not in ast.unparse(value.annotation)

def check_class(c, said, inherited):
    "What a class lacks; a method that replaces a documented one of a base class needs no comments of its own."
    if not ast.get_docstring(c): yield f'{c.name} has no docstring'
    for n in c.body:
        if is_plain(n) and n.target.id[0]!='_' and n.target.id!='schema' and 'dataclass' in names_of(c.decorator_list):
            if not said & set(range(n.lineno, n.end_lineno+1)): yield f'{c.name}.{n.target.id} has no comment'
        if not isinstance(n, DEF) or (n.name[0]=='_' and n.name!='__init__') or 'overload' in names_of(n.decorator_list): continue
        where = f'{c.name}.{n.name}'
        if n.name=='__init__' or n.name in inherited:
            if n.name!='__init__' and not ast.get_docstring(n): yield f'{where} has no docstring'
            elif n.name=='__init__': yield from (p for p in check_function(n, said, where) if 'docstring' not in p)
        else: yield from check_function(n, said, where, returns=False)

@cache
def classes(): return {c.name:c for b in BOOKS for c in tree(b).body if isinstance(c, ast.ClassDef)}

def inherited(c):
    "The methods of the classes of this house that `c` is built on, and of the protocols it may keep to."
    def bases(k): return [n for b in k.bases if (n := ast.unparse(b).split('[')[0].split('.')[-1])]
    up = [classes()[n] for n in bases(c) if n in classes()]
    kept = [k for k in classes().values() if k is not c and 'Protocol' in bases(k)]
    return {n.name for k in (*up, *kept) for n in k.body if isinstance(n, DEF)} | {n for b in up for n in inherited(b)}

@each_book
def test_public_names_are_documented(book):
    said = comments(module(book))
    faults = []
    for n in public(tree(book).body):
        if isinstance(n, ast.ClassDef): faults += check_class(n, said, inherited(n))
        elif 'overload' not in names_of(n.decorator_list): faults += check_function(n, said, n.name)
    assert not faults, '\n'.join(faults)

@each_book
def test_page_form(book):
    "A title with a promise, an example within three cells of nine exports in ten, stored outputs, and a way on."
    cs = cells(book)
    assert re.match(rf'# {room(book)}\n\s*\n> \S', cs[0][1]), 'the first cell is `# name` and `> promise`'
    defines = [i for i,(k,s,_) in enumerate(cs) if k=='code' and EXPORT.search(s) and public(ast.parse(s).body)]
    shown = [any(k=='code' and not EXPORT.search(s) and not re.match(r'#\|\s*hide\b', s) for k,s,_ in cs[i+1:i+4]) for i in defines]
    bare = [public(ast.parse(cs[i][1]).body)[0].name for i,ok in zip(defines, shown, strict=True) if not ok]
    assert len(bare)<=max(1, len(defines)//10), f'of {len(defines)} cells, no example follows {", ".join(bare)}'
    assert any(o for _,_,o in cs), 'no output is stored: run tools/nbrun.py on it'
    assert re.search(r'what next', cs[-1][1], re.I) and '.ipynb' in cs[-1][1], 'the last cell says what next, with links'

@pytest.mark.parametrize('book', [ROOT/'nbs'/'index.ipynb', *sorted((ROOT/'nbs'/'tutorials').glob('*.ipynb'))], ids=lambda f: f.stem)
def test_tutorials_export_nothing_and_show_what_comes_of_them(book):
    cs = cells(book)
    assert re.match(r'# .+\n\s*\n> \S', cs[0][1]), 'the first cell is `# title` and `> promise`'
    assert not [s for k,s,_ in cs if k=='code' and EXPORT.search(s)]
    assert any(o for _,_,o in cs), 'no output is stored: run tools/nbrun.py on it'

def hrefs(contents):
    "The notebooks a sidebar names, in order."
    for o in contents: yield from [o] if isinstance(o, str) else hrefs(o['contents']) if 'contents' in o else [o['href']]

def test_sidebar_names_every_notebook():
    side = yaml.safe_load((ROOT/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    there = {f.relative_to(ROOT/'nbs').as_posix() for f in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts}
    assert sorted(hrefs(side))==sorted(there)
    numbered = [h for h in hrefs(side) if re.match(r'\d', h)]
    assert numbered==sorted(numbered), 'rooms stand in the order of the street'

def python(code):
    "The output of a fresh interpreter."
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

def test_front_door_is_light():
    heavy = "{'torch', 'numpy', 'pandas', 'scipy', 'transformers', 'matplotlib', 'typer'}"
    assert python(f'import sys, stateset_nb; print({heavy} & set(sys.modules), "stateset_nb.core" in sys.modules)')=='set() False'

def test_front_door_knows_every_public_name():
    import stateset_nb
    names = {n.name for b in BOOKS for n in public(tree(b).body)} | set(ROOMS)
    assert names<=set(dir(stateset_nb))
    for n in names: assert getattr(stateset_nb, n).__name__.split('.')[-1]==n

def test_front_door_names_what_is_near():
    import stateset_nb
    with pytest.raises(AttributeError, match="no attribute 'Mesage' — did you mean 'Message'"): _ = stateset_nb.Mesage
    with pytest.raises(ImportError, match="cannot import name 'nothing_like_it'"): exec('from stateset_nb import nothing_like_it')

def test_front_door_loads_one_room():
    assert python('import sys; from stateset_nb import Message; print(sorted(m for m in sys.modules if m.startswith("stateset_nb.")))')=="['stateset_nb._modidx', 'stateset_nb.core']"
