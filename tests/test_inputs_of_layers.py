"Layers that are read at what goes into them: by keyword, at one of several inputs, by the second name of a module"
import pytest
import torch
from torch import nn

from common import KD,X,get_dls,learner,left,net,seed
from fasterdistill.losses import FitNet
from fasterdistill.networks import Net,Taps,activations,find_layer,look

class Two(nn.Module):
    def forward(self, a, b=None, c=None): return a+2*b

class ByName(nn.Module):
    "Calls its head and a module with several inputs by name"
    def __init__(self, w=4):
        super().__init__()
        seed()
        self.net,self.two,self.fc = net(w),Two(),nn.Linear(4*w, 10)
    def feature(self, x):
        n = self.net
        return n.pool(n.layer3(n.layer2(n.layer1(x)))).flatten(1)
    def forward(self, x):
        f = self.feature(x)
        return self.fc(input=self.two(f, b=f.sigmoid()))

def inputs(f): return {'fc:in':f+2*f.sigmoid(), 'embedding':f+2*f.sigmoid(), 'two:in':f, 'two:in[0]':f, 'two:in[a]':f,
                       'two:in[1]':f.sigmoid(), 'two:in[b]':f.sigmoid()}

def test_inputs_by_name_and_position():
    m,x = ByName().eval(),X[:4]
    want = inputs(m.feature(x))
    layers = {n: find_layer(m, n, x) for n in want}
    recorded = activations(look(m, x, layers.values()), layers)
    taps = Taps(m, layers).attach()
    taps.clear(on=True)
    m(x)
    for n,z in want.items():
        torch.testing.assert_close(recorded[n], z)
        torch.testing.assert_close(taps[n], z)
    taps.remove()
    assert not any(o._forward_pre_hooks or o._forward_pre_hooks_with_kwargs for o in m.modules())

def test_resumed_at_an_input_given_by_name():
    m,x = ByName().eval(),X[:4]
    z = torch.randn(4, 16)
    torch.testing.assert_close(Net(m, x).resume('fc:in', z).pred, m.fc(z))
    why = Net(m, x).why_not('two:in[b]')                 # the other input goes around it
    assert 'also depends on what came before' in why

@pytest.mark.parametrize('name,match', [('two:in[d]', r"takes no input 'd'; it takes 'a' \(\[0\]\), 'b' \(\[1\]\)"),
                                        ('two:in[3]', "takes no input '3'"), ('two:in[c]', 'None or not given'),
                                        ('two:pre[b]', 'is no name of a layer')])
def test_inputs_that_are_not_there(name, match):
    m = ByName()
    with pytest.raises(ValueError, match=match):
        layer = find_layer(m, name, X[:2])
        activations(look(m, X[:2], [layer]), {name: layer})

def test_a_fit_reads_inputs_by_name():
    learn = learner(ByName(), get_dls(n=32), cbs=KD(ByName(8), FitNet().at(['fc:in','two:in[b]'])))
    learn.fit(1)
    assert left(learn)==[]

class Shared(nn.Module):
    "One layer under two names"
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.again,self.fc = nn.ModuleDict(dict(b=self.a)),nn.Linear(64, 10)
    def forward(self, x): return self.fc(self.again.b(self.a(x.flatten(1)).relu()))

@pytest.mark.parametrize('name', ['a','again.b','b','a#2','again.b#2'])
def test_the_second_name_of_a_shared_module(name):
    m,x = Shared().eval(),X[:2]
    layer = find_layer(m, name)
    assert (layer.name,layer.n)==('a', 2 if '#' in name else 1)
    z = m.a(x.flatten(1))
    want = m.a(z.relu()) if '#' in name else z
    torch.testing.assert_close(activations(look(m, x, [layer]), {name: layer})[name], want)
