"Write README.md, and its pictures, from the stored outputs of nbs/index.ipynb (nbdev-readme would need Quarto)"
import os
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from bs4 import BeautifulSoup
from fastcore.nbio import nb2str
from fastcore.script import call_parse
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics,filter_stream_,hide_,hide_line,rm_export,rm_header_dash,strip_ansi

note = '<!-- Written by scripts/readme.py from {nb}: edit that, then `make readme` -->'

def md_table(html):
    "The tables of `html` as Markdown, or None if it holds none"
    def row(cs): return '| ' + ' | '.join(cs) + ' |'
    def text(c): return c.get_text(' ', strip=True).replace('|', r'\|')
    def one(t):
        head,*rows = [[text(c) for c in r.find_all(['th','td'])] for r in t.find_all('tr')]
        return '\n'.join(map(row, [head, ['---']*len(head), *rows]))
    return '\n\n'.join(map(one, BeautifulSoup(html, 'html.parser').find_all('table'))) or None

def as_markdown(o):
    "The HTML of an output gives way to Markdown, where it has some or holds tables"
    data = o.get('data', {})
    table = md_table(''.join(data.get('text/html', '')))
    if table: data.setdefault('text/markdown', table)
    if 'text/markdown' in data: data.pop('text/html', None)

def quarto(cell):
    "What Quarto would do for `include`, `echo` and `output`; tables become Markdown"
    if cell.cell_type!='code': return
    d = {k:v.lower() for k,v in cell.directives_.items()}
    if d.get('include')=='false':
        del cell['source']
        return
    if d.get('echo')=='false' or not cell.source.strip(): cell.metadata['transient'] = dict(remove_source=True)
    if d.get('output')=='false': cell['outputs'] = []
    for o in cell.outputs:
        if o.output_type=='stream' and d.get('output')=='asis':
            o.update(output_type='display_data', metadata={}, data={'text/markdown':o.pop('text')})
            o.pop('name')
        as_markdown(o)

def relink(md, folder):
    "Make `md`'s relative links, written in `folder`, right one level up; code is left alone"
    def fix(m):
        u = urlsplit(m[2])
        if u.scheme or u.netloc or not u.path or u.path[0]=='/': return m[0]
        return m[1] + os.path.normpath(f'{folder}/{m[2]}').replace(os.sep, '/')
    def text(s): return re.sub(r'(\]\(|\b(?:src|href)=["\'])([^)\s"\']+)', fix, s)
    parts = re.split(r'(```.*?```|`[^`\n]*`)', md, flags=re.S)
    return ''.join(s if i%2 else text(s) for i,s in enumerate(parts))

def convert(path, folder):
    """README text, and `{name:bytes}` of the pictures, of the notebook at `path`,
    links relative to the parent of `folder`"""
    procs = [hide_, hide_line, rm_export, rm_header_dash, clean_magics, strip_ansi, filter_stream_, quarto]
    nb = NBProcessor(path, procs, process=True).nb
    for c in nb.cells:
        if c.cell_type=='markdown': c.source = relink(c.source, folder)
        for data in (o.get('data', {}) for o in c.get('outputs', ())):
            if 'text/markdown' in data: data['text/markdown'] = relink(''.join(data['text/markdown']), folder)
    nb = nbformat.reads(nb2str(nb), as_version=4)
    nb.metadata['language_info'] = dict(name='python') # nbdev-clean drops it
    md,res = MarkdownExporter().from_notebook_node(nb, dict(unique_key='readme', output_files_dir=f'{folder}/images'))
    title,rest = md.strip().split('\n', 1)
    md = f'{title}\n\n{note.format(nb=f"{folder}/{path.name}")}\n\n{rest}\n'
    return re.sub(r'\n(?:[ \t]*\n){2,}', '\n\n', md), res['outputs']

@call_parse
def main(
    check:bool=False, # Write nothing; exit with 1 if something would change
    root:Path=Path(__file__).resolve().parent.parent, # Folder of the project
):
    "Write README.md and its pictures from nbs/index.ipynb"
    cfg = get_config(root)
    folder = cfg.nbs_path.relative_to(root).as_posix()
    md,pics = convert(cfg.nbs_path/cfg.readme_nb, folder)
    files = {root/k:v for k,v in pics.items()} | {root/'README.md': md.encode()}
    stale = set((cfg.nbs_path/'images').glob('readme_*')) - files.keys()
    diff = [f for f,v in files.items() if not f.exists() or f.read_bytes()!=v]
    if check:
        names = ' '.join(f.name for f in [*diff,*stale])
        if names: sys.exit(f'Not what {folder}/{cfg.readme_nb} gives, run make readme: {names}')
        return
    for f in diff:
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(files[f])
    for f in stale: f.unlink()
