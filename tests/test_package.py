"What is built and what is imported: the wheel, the sdist, the three files that describe them, and the arrows between modules"
import ast,json,re,shutil,subprocess,sys,tarfile,zipfile
from configparser import ConfigParser
from email import message_from_string
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
extras = {k[:-len('_requirements')]:v.split() for k,v in cfg.items() if k.endswith('_requirements')}

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
    r = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, src], capture_output=True, text=True)
    assert r.returncode==0, r.stdout+r.stderr
    return next(out.glob('*.whl')),next(out.glob('*.tar.gz'))

@pytest.fixture(scope='module')
def wheel(dist):
    with zipfile.ZipFile(dist[0]) as z: return {n:z.read(n).decode() for n in z.namelist()}

@pytest.fixture(scope='module')
def meta(wheel): return message_from_string(next(v for k,v in wheel.items() if k.endswith('.dist-info/METADATA')))

def reqs(o): return {(r.name, str(r.specifier), frozenset(r.extras), str(r.marker or '')) for r in map(Requirement, o)}

def test_metadata(meta):
    assert meta['Name']==lib and meta['Version']==version()!='0.0.0'
    assert meta['Summary']==cfg['description'] and meta['Author']==cfg['author']
    assert meta['License-Expression']==cfg['license'] and meta['License-File']=='LICENSE'
    assert meta['Requires-Python']==f">={cfg['min_python']}"
    assert meta['Keywords'].split(',')==cfg['keywords'].split()
    assert meta['Description-Content-Type']=='text/markdown'
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
    p = proj['project']
    assert p['name']==lib and p['requires-python']==f">={cfg['min_python']}" and p['license']==cfg['license']
    assert proj['tool']['nbdev']['lib_path']==lib
    assert not {'version', 'dependencies', 'optional-dependencies', 'scripts', 'description'} & p.keys()
    assert not {'version', 'dependencies', 'optional-dependencies', 'scripts', 'description'} - set(p['dynamic'])
    assert 'version' not in cfg and version() not in (root/'setup.py').read_text()

_imports = '''
import importlib,json,pkgutil,sys
losses,res = importlib.import_module(f'{lib}.losses'),[]
mods = ['layers', 'net', 'loss', 'adapters', *(f'losses.{o.name}' for o in pkgutil.iter_modules(losses.__path__)), 'teachers', 'callback']
for o in mods:
    importlib.import_module(f'{lib}.{o}')
    res.append((o, [m for m in never+learner if m in sys.modules]))
print(json.dumps(res))
'''

def test_imports():
    "In one process, in the order of the arrows: the module that first brings in what it may not is the one named"
    never,learner = ['fastai.vision.all', 'spacy', 'timm'],['fastai.learner', f'{lib}.teachers', f'{lib}.callback']
    src = f'lib,never,learner = {lib!r},{never},{learner}' + _imports
    r = subprocess.run([sys.executable, '-c', src], capture_output=True, text=True, cwd=root)
    assert r.returncode==0, r.stderr
    res = json.loads(r.stdout.splitlines()[-1])
    assert len(res)>6 and res[-1][0]=='callback'
    for mod,found in res:
        banned = never if mod in ('teachers', 'callback') else never+learner
        assert not set(found)&set(banned), f'importing {lib}.{mod} imports {found}'
