"""What a page says of an exported name, from the source itself: the signature as it was written, the methods, and the code, folded."""
import ast, json, re, textwrap
from functools import cache

DEF = (ast.FunctionDef, ast.AsyncFunctionDef)

@cache
def parsed(path):
    "The lines of a module, and its syntax tree."
    text = path.read_text(encoding='utf-8')
    return text.splitlines(), ast.parse(text)

def find(path, name):
    "The definition of `name` (`Class.method` too) in a module; None when it is something else."
    node = parsed(path)[1]
    for part in name.split('.'):
        node = next((n for n in node.body if isinstance(n, (*DEF, ast.ClassDef)) and n.name==part), None) if isinstance(node, (ast.Module, ast.ClassDef)) else None
    return node

def start(node): return min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))])

def text(path, first, last): return textwrap.dedent('\n'.join(parsed(path)[0][first-1:last])).rstrip()

def is_doc(n): return isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)

def is_public(n): return isinstance(n, DEF) and n.name[0]!='_'

def signature(path, node):
    "A function up to its body, or a class with its fields and its `__init__` up to its body."
    body = [n for n in node.body if not is_doc(n)]
    if isinstance(node, DEF):
        first = node.body[0]
        return text(path, start(node), first.lineno-1 if first.lineno>node.lineno else node.lineno)
    fields = [n for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.target.id[0]!='_']
    init = next((n for n in body if isinstance(n, DEF) and n.name=='__init__'), None)
    parts = [text(path, start(node), node.lineno), *(textwrap.indent(text(path, n.lineno, n.end_lineno), '    ') for n in fields)]
    if init is not None: parts.append(textwrap.indent(signature(path, init), '    '))
    return '\n'.join(parts)

def methods(node, name):
    "The public methods of a class, one line each, with the anchors nbdev's index gives them."
    if not isinstance(node, ast.ClassDef): return ''
    rows = [f'- `{n.name}`{{ #{name.lower()}.{n.name.lower()} }} — {(ast.get_docstring(n) or "").splitlines()[0]}' for n in node.body if is_public(n) and ast.get_docstring(n)]
    return '\n'.join(dict.fromkeys(rows))

def folded(title, code): return f'<details class="source" markdown data-search-exclude>\n<summary>{title}</summary>\n\n```python\n{code}\n```\n\n</details>'

def source(path, node):
    "The code, folded, and left out of the search."
    return folded('source', text(path, start(node), node.end_lineno))

def named(n):
    "The names a statement defines."
    if isinstance(n, (*DEF, ast.ClassDef)): return [n.name]
    targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]

def unseen(notebook):
    "What exported cells hold that nbdev leaves off the page, all but public functions and classes: folded, by the id of the page's cell before it."
    res,before = {},None
    for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        code = ''.join(c['source'])
        if c['cell_type']!='code' or not re.search(r'^#\|\s*export', code, re.M):
            before = c['id']
            continue
        lines = code.splitlines()
        rest = [n for n in ast.parse(code).body if not isinstance(n, (ast.Import, ast.ImportFrom)) and not (isinstance(n, (*DEF, ast.ClassDef)) and n.name[0]!='_')]
        names = [name for n in rest for name in named(n)]
        parts = ['\n'.join(lines[start(n)-1:n.end_lineno]) for n in rest]
        if names: res.setdefault(before, []).append(folded(', '.join(f'<code>{n}</code>' for n in names), '\n\n'.join(parts)))
    return res

def line(path, name):
    "Where a definition starts, to put what a cell defines in its own order."
    node = find(path, name)
    return 0 if node is None else node.lineno
