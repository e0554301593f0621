"""What a page says of an exported name, from the source itself: the signature as it was written, the methods, and the code, folded."""
import ast, textwrap
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

def start(node): return min([node.lineno, *(d.lineno for d in node.decorator_list)])

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

def source(path, node):
    "The code, folded, and left out of the search."
    code = text(path, start(node), node.end_lineno)
    return f'<details class="source" markdown data-search-exclude>\n<summary>source</summary>\n\n```python\n{code}\n```\n\n</details>'

def line(path, name):
    "Where a definition starts, to put what a cell defines in its own order."
    node = find(path, name)
    return 0 if node is None else node.lineno
