"The recipes of `benchmarks/`, and what its last run says each method was tried on"
import json
import sys
from pathlib import Path

import pytest

from fasterdistill import losses
from fasterdistill.loss import DistillLoss

folder = Path(__file__).parent.parent/'benchmarks'
sys.path.append(str(folder))
import methods  # noqa: E402
from recipes import part,recipes  # noqa: E402

known = json.loads((folder/'methods.json').read_text())

def test_every_method_has_a_recipe_and_was_tried():
    "Each by its own name; `BinarySoftTarget` is for several labels an item, which digits do not have"
    found = {n: getattr(losses, n) for n in losses.__all__}
    names = {n for n,o in found.items() if isinstance(o, type) and issubclass(o, DistillLoss) and o.__name__==n}
    assert names=={*recipes,'BinarySoftTarget'}
    for n in recipes: assert {'recipe','tried'}<=known[n].keys()

def test_a_part_of_the_fit():
    assert [part(n, 20) for n in (240,120,24,1)]==[20,10,2,1]

def test_recipes_are_what_the_run_had():
    for n in recipes: assert known[n]['recipe']==methods.written(n)

quick = 'SoftTarget','ActivationBoundaries','TAS'
@pytest.mark.parametrize('name', [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in recipes])
def test_tried_on(name):
    "What the table ticks is so"
    assert methods.tried(name)==known[name]['tried']
