import pytest,torch

def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for o in items:
        if o.get_closest_marker('cuda'): o.add_marker(pytest.mark.skip(reason='needs a GPU'))
