"The command line: it answers before anything heavy is imported, and says where it left what"
import subprocess
import sys

import numpy as np
import pytest

script = '''
import sys,time
start = time.process_time()
from fasterdistill.cli import demo
try: code = demo()
except SystemExit as e: code = e.code
heavy = {'torch','fastai','numpy','pandas','matplotlib'} & set(sys.modules)
print('code', code, 'heavy', sorted(heavy), 'seconds', time.process_time()-start)
'''

@pytest.fixture
def run(tmp_path):
    "`fasterdistill_demo` in a process of its own, as the console script runs it"
    file = tmp_path/'fasterdistill_demo.py'
    file.write_text(script)
    def run(*args):
        r = subprocess.run([sys.executable, '-W', 'ignore', file, *args], capture_output=True, text=True)
        return r.stdout+r.stderr
    return run

def test_help_imports_nothing_heavy(run):
    said = run('--help')
    assert 'Epochs a student is trained' in said and 'Folder for demo.png' in said and 'code 0 heavy [] seconds' in said
    assert float(said.split()[-1])<2

def test_a_misspelt_option(run):
    said = run('--epoks', '3')
    assert 'unrecognized arguments: --epoks' in said and 'heavy []' in said

@pytest.fixture
def images(tmp_path):
    "Forty dark and bright images"
    rng,y = np.random.default_rng(0),np.arange(40)%4
    x = (60*y[:,None,None]+rng.integers(0, 40, (40,8,8))).astype(np.uint8)
    np.savez(tmp_path/'images.npz', x=x, y=y)
    return tmp_path/'images.npz'

def test_it_ends_with_the_picture(run, images, tmp_path):
    out = tmp_path/'new'/'folder'
    said = run('--data', images, '--epochs', '1', '--teacher-epochs', '1', '--seeds', '1', '--out', out)
    assert (out/'demo.png').stat().st_size>1000
    *_,picture,_ = said.rstrip().splitlines()
    assert picture==f'The picture: {out/"demo.png"}'
    assert 'student distilled' in said and 'agreement with teacher' in said

def test_options_that_do_not_fit(run, images):
    "Said on one line, before anything is trained"
    said = run('--data', images, '--seeds', '0')
    assert 'fasterdistill_demo: epochs 30, teacher epochs 25, seeds 0: expected 1 or more of each' in said
    assert 'epoch ' not in said

why = 'not ahead after 3 epochs. In a short run this happens: at the start the labels alone'
@pytest.mark.parametrize('alone,distilled,says', [(.9,.95,''), (.95,.95,why), (.95,.9,why)])
def test_remark(alone, distilled, says):
    from fasterdistill.demo import Run,remark
    def runs(*last): return [Run(None, [.5,.6,o], 1.) for o in last]
    named = {'teacher': runs(.99), 'student alone': runs(alone, alone), 'student distilled': runs(distilled, distilled)}
    said = remark(named)
    assert says in said and bool(said)==bool(says)
