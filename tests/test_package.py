"What is built and what is imported: the wheel, the sdist, the files that describe them, and the arrows between modules"
import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_string
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).parents[1]
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lib = cfg['lib_name']
proj = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}

def version():
    "`__version__` of the source, by a way of its own"
    return re.findall(r'^__version__ = "(.+)"$', (root/lib/'__init__.py').read_text(), flags=re.M)[0]

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "`(wheel, sdist)` of a copy of the project: what lies about in the working tree neither leaks in nor is added to"
    src,out = tmp_path_factory.mktemp('src'),tmp_path_factory.mktemp('dist')
    for f in root.iterdir():
        if f.is_file(): shutil.copy(f, src)
    shutil.copytree(root/lib, src/lib, ignore=shutil.ignore_patterns('__pycache__'))
    cmd = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, src]
    r = subprocess.run(cmd, capture_output=True, text=True)
    assert r.returncode==0, r.stdout+r.stderr
    return next(out.glob('*.whl')),next(out.glob('*.tar.gz'))

@pytest.fixture(scope='module')
def wheel(dist):
    with zipfile.ZipFile(dist[0]) as z: return {n:z.read(n).decode() for n in z.namelist()}

@pytest.fixture(scope='module')
def meta(wheel): return message_from_string(next(v for k,v in wheel.items() if k.endswith('.dist-info/METADATA')))

def reqs(o): return {(r.name, str(r.specifier), frozenset(r.extras), str(r.marker or '')) for r in map(Requirement, o)}

def test_metadata(meta):
    want = {
        'Name': lib, 'Summary': cfg['description'], 'Author': cfg['author'], 'License-Expression': cfg['license'],
        'License-File': 'LICENSE', 'Requires-Python': f">={cfg['min_python']}",
        'Description-Content-Type': 'text/markdown'}
    assert {k: meta[k] for k in want}==want
    assert meta['Version']==version()!='0.0.0'
    assert meta['Keywords'].split(',')==cfg['keywords'].split()
    assert meta.get_payload().strip()==(root/'README.md').read_text(encoding='utf-8').strip()

def test_requirements(meta):
    want = [*cfg['requirements'].split(), *(f'{o}; extra=="{k}"' for k,v in extras.items() for o in v)]
    assert set(meta.get_all('Provides-Extra'))==extras.keys()
    assert reqs(meta.get_all('Requires-Dist'))==reqs(want)
    assert all(r.specifier or r.extras for r in map(Requirement, want)), 'a requirement without a lower bound'

def test_contents(dist, wheel):
    mods = {p.relative_to(root).as_posix() for p in (root/lib).rglob('*.py')}
    assert {k for k in wheel if '.dist-info/' not in k}==mods
    points = ConfigParser(delimiters=['='])
    points.read_string(next(v for k,v in wheel.items() if k.endswith('entry_points.txt')))
    assert [f'{k}={v}' for k,v in points['console_scripts'].items()]==cfg['console_scripts'].split()
    assert dict(points['nbdev'])=={lib: f'{lib}._modidx:d'}
    with tarfile.open(dist[1]) as t: names = {n.partition('/')[2] for n in t.getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'README.md', *mods} <= names

def test_entry_points_exist():
    for o in cfg['console_scripts'].split():
        mod,_,fn = o.partition('=')[2].partition(':')
        tree = ast.parse((root/mod.replace('.', '/')).with_suffix('.py').read_text(encoding='utf-8'))
        assert fn in {o.name for o in tree.body if isinstance(o, ast.FunctionDef)}

def test_one_place():
    "pyproject.toml says what settings.ini says, and neither says what another file is for"
    p,elsewhere = proj['project'],{'version','dependencies','optional-dependencies','scripts','description'}
    assert p['name']==lib
    assert p['requires-python']==f">={cfg['min_python']}"
    assert p['license']==cfg['license']
    assert proj['tool']['nbdev']['lib_path']==lib
    assert not elsewhere & p.keys()
    assert elsewhere<={*p['dynamic']}
    assert 'version' not in cfg
    assert version() not in (root/'setup.py').read_text()

# ---- the arrows ----

order = '''networks.as_it_was networks.record networks.layouts networks.precision networks.stages networks.names
    networks.taps networks.rehearsal
    networks.cuts networks.net networks.adapters networks.bifpn
    companion weight loss task losses expressions
    teachers.codes teachers.tables teachers.teacher teachers.ema state missing
    fit.terms fit.side fit.batch fit.learned fit.columns fit.nonsense fit.opening fit.plan fit.teaching fit.beside
    callback checkpoint show demo examples cli all'''.split()

def place(module):
    "Its number in the order; the losses share one"
    return order.index('losses' if module.startswith('losses.') else module)

def dotted(path): return '.'.join(path.relative_to(root/lib).with_suffix('').parts)

files = {dotted(p): p for p in sorted((root/lib).rglob('*.py')) if not p.name.startswith('_')}
trees = {m: ast.parse(p.read_text(encoding='utf-8')) for m,p in files.items()}

def in_folder(name): return [m for m in files if m.startswith(f'{name}.' if name else '')]

def resolved(name, what):
    "The modules that `from name import what` reads: `what` itself, `name`, or all of a folder"
    whole = f'{name}.{what}'.strip('.')
    for o in (whole,name):
        if o in files: return [o]
        if in_folder(o): return in_folder(o)
    return []

def imports(module):
    "`(module, name)` of all that a module imports of ours, at the top or in a function"
    here = module.split('.')[:-1]
    for n in ast.walk(trees[module]):
        if isinstance(n, ast.Import):
            ours = [a.name for a in n.names if a.name.split('.')[0]==lib]
            yield from ((m,None) for o in ours for m in resolved(o[len(lib)+1:], ''))
        elif isinstance(n, ast.ImportFrom):
            path = (n.module or '').split('.') if n.module else []
            if not n.level and path[:1]!=[lib]: continue
            path = path[1:] if not n.level else here[:len(here)-n.level+1]+path
            yield from ((m,a.name) for a in n.names for m in resolved('.'.join(path), a.name))

def test_every_module_has_a_place():
    found = {'losses' if m.startswith('losses.') else m for m in files}
    assert found-{*order}==set(), 'modules without a place in the order'
    assert {*order}-found==set(), 'places without a module'

@pytest.mark.parametrize('module', [m for m in files if m!='all'])
def test_arrows_go_one_way(module):
    "A module imports what comes before it; losses may import their sisters"
    for other,_ in imports(module):
        sisters = place(other)==place(module) and other!=module
        assert place(other)<place(module) or sisters, f'{module} imports {other}, which comes after it'

def test_examples_are_for_lessons():
    "What lessons share is no part of the package: nothing in it stands on the examples, and the star leaves them out"
    assert [m for m in files if any(other=='examples' for other,_ in imports(m))]==[]

def test_no_circle():
    TopologicalSorter({m: {o for o,_ in imports(m)} for m in files}).prepare()

def private(name): return bool(name) and name.startswith('_') and not name.startswith('__')

def of_self(n): return getattr(n.value, 'id', '') in ('self','cls')

def defined(module):
    "Private names that a module gives to functions, classes, variables and attributes of its own"
    res = set()
    for n in ast.walk(trees[module]):
        if isinstance(n, (ast.FunctionDef,ast.ClassDef)): res.add(n.name)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): res.add(n.id)
        elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and of_self(n): res.add(n.attr)
        elif isinstance(n, ast.Call) and ast.unparse(n.func)=='self.__dict__.update': res |= {k.arg for k in n.keywords}
    return set(filter(private, res))

def by_string(n):
    "Whether this is `getattr(o, '_name')`, or its like"
    f = getattr(n.func, 'id', '')
    return f in ('getattr','hasattr','setattr','delattr') and len(n.args)>1 and isinstance(n.args[1], ast.Constant)

def read_of_others(module):
    "Private names that are read of, or set on, something else than `self`"
    for n in ast.walk(trees[module]):
        if isinstance(n, ast.Attribute) and not of_self(n): yield n.attr
        elif isinstance(n, ast.Call) and by_string(n): yield n.args[1].value

@pytest.mark.parametrize('module', files)
def test_no_underscore_crosses_modules(module):
    "What another module needs is public there: nothing private of ours is imported, or read of a module or an object"
    imported = [f'{m}.{name}' for m,name in imports(module) if private(name)]
    assert imported==[]
    mine,theirs = defined(module),set().union(*(defined(m) for m in files if m!=module))
    read = {n for n in read_of_others(module) if private(n) and n not in mine}
    assert read & theirs==set()

never = ['fastai.vision.all','spacy','timm']
learner = ['fastai.learner',*(f'{lib}.{o}' for o in ('teachers','fit','callback'))]

_imports = '''
import importlib,json,sys
res = []
for module in modules:
    importlib.import_module(f'{lib}.{module}')
    res.append((module,[m for m in banned if m in sys.modules]))
print(json.dumps(res))
'''

def test_imports():
    "In one process, in the order of the arrows: the module that first brings in what it may not is the one named"
    modules = [m for m in sorted(files, key=place) if place(m)<order.index('demo')]
    given = f'lib,modules,banned = {lib!r},{modules},{never+learner}'
    r = subprocess.run([sys.executable, '-c', given+_imports], capture_output=True, text=True, cwd=root)
    assert r.returncode==0, r.stderr
    res = json.loads(r.stdout.splitlines()[-1])
    assert [m for m,_ in res]==modules
    assert len(modules)>15
    for module,found in res:
        banned = never+learner if place(module)<order.index('teachers.codes') else never
        assert not set(found)&set(banned), f'importing {lib}.{module} imports {found}'

_stars = '''
import importlib,json
ours = importlib.import_module(f'{lib}.all')
res = {}
for name in ('vision.all','text.all','tabular.all','collab'):
    theirs = vars(importlib.import_module(f'fastai.{name}'))
    res[name] = [n for n in ours.__all__ if n in theirs and theirs[n] is not getattr(ours, n)]
print(json.dumps([len(ours.__all__),res]))
'''

def test_star_import():
    "After one of fastai's own it gives no name another meaning"
    r = subprocess.run([sys.executable, '-c', f'lib = {lib!r}'+_stars], capture_output=True, text=True, cwd=root)
    assert r.returncode==0, r.stderr
    n,taken = json.loads(r.stdout.splitlines()[-1])
    assert n>30
    assert taken=={name: [] for name in ('vision.all','text.all','tabular.all','collab')}
