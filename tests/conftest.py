import sys
import pytest,torch

def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for o in items:
        if o.get_closest_marker('cuda'): o.add_marker(pytest.mark.skip(reason='needs a GPU'))

def pytest_addoption(parser): parser.addoption('--write-matrix', action='store_true', help='write what test_fastai.py finds into the documentation')

def pytest_terminal_summary(terminalreporter, config):
    "What works with what, as the cells that ran found it"
    m = sys.modules.get('test_fastai')
    if m is None or not m.matrix: return
    for line in m.shown(): terminalreporter.write_line(line)
    if config.getoption('--write-matrix'): m.page.write_text('\n'.join(m.written())+'\n')
