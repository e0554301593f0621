"""What is built can be installed, and holds what it should."""
import os, subprocess, sys, zipfile
import pytest

def run(*args, **kwargs):
    "A command that must succeed; what it printed."
    done = subprocess.run(args, capture_output=True, text=True, **kwargs)
    assert done.returncode==0, done.stdout+done.stderr
    return done.stdout

@pytest.fixture(scope='module')
def built(root, tmp_path_factory):
    "The folder with an sdist of the checkout and a wheel made from that sdist."
    out = tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, root)
    return out

@pytest.fixture(scope='module')
def bare(built, tmp_path_factory):
    "A folder with the installed wheel and nothing else."
    out = tmp_path_factory.mktemp('bare')
    run(sys.executable, '-m', 'pip', 'install', '-qq', '--no-deps', '--target', out, next(built.glob('*.whl')))
    return out

def test_wheel_holds_the_package_only(built, root):
    wheel, = built.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split('/')[0] for n in names if '.dist-info' not in n}=={'stateset_nb'}
    assert {n for n in names if n.endswith('.py')}=={f'stateset_nb/{f.name}' for f in (root/'stateset_nb').glob('*.py')}
    assert {'stateset_nb/py.typed', *(f'stateset_nb/data/{f.name}' for f in (root/'stateset_nb'/'data').iterdir())}<=set(names)
    front = [f for f in (root/'stateset_nb'/'static').rglob('*') if f.is_file()]
    assert {f.relative_to(root).as_posix() for f in front}<=set(names) and {'LICENSE.uPlot', 'uPlot.iife.min.js', 'kit.js'}<={f.name for f in front}

def test_wheel_says_what_it_needs(built):
    wheel = zipfile.ZipFile(next(built.glob('*.whl')))
    meta = wheel.read(next(n for n in wheel.namelist() if n.endswith('/METADATA'))).decode()
    assert 'License-Expression: Apache-2.0' in meta or 'License: Apache-2.0' in meta
    needs = [line for line in meta.splitlines() if line.startswith('Requires-Dist: ') and 'extra ==' not in line]
    assert not [n for n in needs if 'nbdev' in n or 'fastcore' in n], 'what makes the package is not what it runs on'
    assert {'widgets', 'docs', 'dev', 'all'}<={line.split()[-1] for line in meta.splitlines() if line.startswith('Provides-Extra: ')}
    entry = wheel.read(next(n for n in wheel.namelist() if n.endswith('/entry_points.txt'))).decode()
    assert 'stateset-nb = stateset_nb.cli:main' in entry.replace('=', ' = ').replace('  ', ' ')

def test_every_public_name_imports_from_the_wheel(bare, tmp_path):
    code = ("import stateset_nb, sys; from pathlib import Path; names = [n for n in dir(stateset_nb) if n[0]!='_'];"
            "assert Path(stateset_nb.__file__).is_relative_to(sys.argv[1]), stateset_nb.__file__;"
            "[getattr(stateset_nb, n) for n in names]; print(len(names))")
    assert int(run(sys.executable, '-c', code, bare, cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(bare)}))>20
