"Hand what settings.ini says, and the version of fasterdistill/__init__.py, to setuptools"
import ast
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup,find_packages

def read(fn): return (Path(__file__).parent/fn).read_text(encoding='utf-8')

def version(src):
    assigned = [o for o in ast.parse(src).body if isinstance(o, ast.Assign)]
    return next(o.value.value for o in assigned if o.targets[0].id=='__version__')

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read_string(read('settings.ini'))
cfg = cfg['DEFAULT']
lib,post = cfg['lib_name'],'_requirements'

setup(
    version=version(read(f'{lib}/__init__.py')),
    description=cfg['description'], author=cfg['author'], keywords=cfg['keywords'].split(),
    long_description=read('README.md'), long_description_content_type='text/markdown',
    packages=find_packages(include=[lib, f'{lib}.*']),
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix(post): v.split() for k,v in cfg.items() if k.endswith(post)},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{lib}={lib}._modidx:d']))
