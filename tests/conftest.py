import matrix
import pytest
import torch

torch.set_num_threads(1)            # pytest-xdist's workers share the cores, and bit-equality wants one order of sums

def pytest_addoption(parser):
    parser.addoption('--write-matrix', action='store_true',
                     help='write what test_fastai.py finds into the documentation')

def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for o in items:
        if o.get_closest_marker('cuda'): o.add_marker(pytest.mark.skip(reason='needs a GPU'))

# ---- what tests share ----

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    "Every test in a folder of its own: Learners write where they stand, and tests may run side by side"
    monkeypatch.chdir(tmp_path)

@pytest.fixture
def teacher():
    from common import net
    return net(8, s=1)

@pytest.fixture
def float64():
    """Networks, data and learned parts are float64.
    For weights after steps taken in two ways: two orders of a sum leave 1e-15 between them, far below any fault."""
    from common import floating
    with floating(torch.float64): yield

# ---- what works with what, as the cells that ran found it, brought to the process that prints ----

def pytest_sessionfinish(session):
    out = getattr(session.config, 'workeroutput', None)
    if out is not None: out['matrix'] = matrix.found.dump()

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    matrix.found.load(getattr(node, 'workeroutput', {}).get('matrix'))

def pytest_terminal_summary(terminalreporter, config):
    if not matrix.found.cells: return
    for line in matrix.found.shown(): terminalreporter.write_line(line)
    if config.getoption('--write-matrix'): matrix.page.write_text('\n'.join(matrix.found.written())+'\n')
