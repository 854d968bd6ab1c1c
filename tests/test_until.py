"Passes that end at a layer, whole and resumed: what they return, what does not run, and what they leave"
import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import KD,X,hooked,learner,left,net,seed,state
from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.networks import Net,activations,find_layer,look

class Shared(nn.Module):
    "One activation for all, three times inside of blocks and twice outside; a tuple between"
    def __init__(self, s=0):
        super().__init__()
        seed(s)
        self.relu = nn.ReLU(inplace=True)
        def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), self.relu)
        self.layer1,self.layer2,self.layer3 = block(1, 4),block(4, 8),block(8, 8)
        self.two,self.mid,self.fc = Two(),nn.Conv2d(8, 8, 1),nn.Linear(8, 10)
    def forward(self, x):
        z = self.relu(self.mid(self.layer2(self.layer1(x))))
        a,b = self.two(self.layer3(z))
        return self.fc(self.relu(a+b).mean((2,3)))

class Two(nn.Module):
    "A tuple"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
    def forward(self, z): return self.conv(z),z*2

names = ['layer1','layer2:pre','relu','relu#2','relu#3','relu#3:in','relu#4','relu#5','relu#5:in','mid','two[0]',
         'two[1]','layer3:in','stage2','fc:in','embedding','output']

def counted(model, run):
    "What `run()` returns, and how often it called each module without children"
    calls = Counter()
    hooks = [m.register_forward_pre_hook(lambda m, a, n=n: calls.update([n])) for n,m in model.named_modules()]
    try: return run(),calls
    finally:
        for h in hooks: h.remove()

def read(model, x, name):
    "What a whole pass returns at a layer, by a record of it"
    layer = find_layer(model, name, x)
    return activations(look(model, x, [layer]), {name: layer})[name]

@pytest.mark.parametrize('name', names)
def test_a_pass_ends_at(name):
    m,x = Shared().eval(),X[:4]
    n = Net(m, x)
    n.find(name)                                         # which may take a pass
    before,want = state(m),read(m, x, name)
    view,calls = counted(m, lambda: n(x, bn='eval', until=name))
    assert view.pred is None
    assert list(view.fm)==[name]
    assert torch.equal(view.fm[name], want)
    rec = look(m, x)
    when = rec.when(find_layer(m, name, x))
    begun = Counter(c.name for c in rec if c.start<when)         # by the record of a whole pass
    assert calls-begun==Counter({find_layer(m, name, x).name: 1} if name.endswith((':in',':pre')) or
                                name in ('fc:in','embedding') else {})
    assert before.keys()==state(m).keys()
    assert all(torch.equal(a, b) for a,b in zip(before.values(), state(m).values(), strict=True))
    assert list(hooked(m))==[]

@pytest.mark.parametrize('cut', ['layer1','layer2','layer3:in'])
@pytest.mark.parametrize('name', names)
def test_a_resumed_pass_ends_at(cut, name):
    "The calls of a shared module are counted as in the whole pass, though some are not made"
    m,x = Shared().eval(),X[:4]
    n = Net(m, x)
    rec,z = look(m, x),read(m, x, cut)
    ticks = [rec.when(find_layer(m, o, x)) for o in (cut,name)]
    if ticks[1]<=ticks[0]:
        with pytest.raises(ValueError, match=f'that comes before {cut!r}, or is the same'): n.resume(cut, z, until=name)
        return
    n.why_not(cut)
    n.find(name)
    view,calls = counted(m, lambda: n.resume(cut, z, bn='eval', until=name))
    assert view.pred is None
    torch.testing.assert_close(view.fm[name], read(m, x, name))
    if name!='output': assert not calls['fc'] or name in ('fc:in','embedding')
    part = n.resume(cut, z[:2], bn='eval', until=name).fm[name]
    torch.testing.assert_close(part, read(m, x, name)[:2])
    assert list(hooked(m))==[]

@pytest.mark.parametrize('name', ['relu#4','relu#5','relu#5:in'])
def test_taps_behind_a_cut_count_calls_as_in_the_whole_pass(name):
    "Behind `layer1`, whose own call of the shared activation is not made"
    m,x = Shared().eval(),X[:4]
    n = Net(m, x, layers=['relu',name])
    z = read(m, x, 'layer1')
    want,fm = n(x, bn='eval'),n.resume('layer1', z, bn='eval').fm
    assert list(fm)==[name]
    torch.testing.assert_close(fm[name], want.fm[name])

def test_what_is_read_on_the_way_comes_too():
    m = net()
    view = Net(m, X[:4], layers=['layer1','layer2','layer3'])(X[:4], until='layer2')
    assert list(view.fm)==['layer1','layer2']
    view = Net(m, X[:4], layers=['layer1','layer3'])(X[:4], until='layer2')
    assert list(view.fm)==['layer1','layer2']

def test_gradients_and_averages():
    "Those of what ran; averages move with bn='update' alone, and only where it ran"
    m,x = net().train(),X[:4]
    n = Net(m, x)
    want = torch.autograd.grad(m.layer2(m.layer1(x)).sum(), m.layer1[0].weight)[0]
    m = net().train()
    n = Net(m, x)
    got = torch.autograd.grad(n(x, until='layer2').fm['layer2'].sum(), m.layer1[0].weight)[0]
    torch.testing.assert_close(got, want)
    assert [m.get_submodule(f'layer{i}.1').num_batches_tracked.item() for i in (1,2,3)]==[0,0,0]
    n(x, bn='update', until='layer2')
    assert [m.get_submodule(f'layer{i}.1').num_batches_tracked.item() for i in (1,2,3)]==[1,1,0]

class Remembers(nn.Module):
    "Counts its passes, and keeps what it saw in a list"
    def __init__(self):
        super().__init__()
        self.body,self.head,self.n,self.seen = net().layer1,nn.Linear(4, 10),0,[]
    def forward(self, x):
        self.n += 1
        self.seen.append(x)
        try: return self.head(self.body(x).mean((2,3)))
        finally: self.seen.append('end')

def test_what_a_network_remembers():
    m = Remembers()
    n = Net(m, X[:4])
    for until in ('body',None,'body'): n(X[:4], until=until)
    assert (m.n,m.seen)==(0,[])

def test_errors():
    m = net()
    n = Net(m, X[:4])
    with pytest.raises(ValueError, match="has no layer 'leyer2'; nearest: 'layer"): n(X[:4], until='leyer2')
    with pytest.raises(ValueError, match="the layer 'layer2#2' of the network .* did not run"):
        n(X[:4], until='layer2#2')
    class Broken(Exception): pass
    def broken(*_): raise Broken
    h = m.layer1.register_forward_pre_hook(broken)
    with pytest.raises(Broken): n(X[:4], until='layer2')
    h.remove()
    assert list(hooked(m))==[]
    assert n(X[:4], until='layer2').pred is None

@pytest.mark.parametrize('reentrant', [False,True])
def test_inside_a_checkpoint(reentrant):
    "The pass ends inside of a segment that is to be computed again"
    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
        def forward(self, x): return checkpoint(self.net, x, use_reentrant=reentrant)
    m,x = Segments(),X[:4].requires_grad_()
    z = Net(m, x)(x, until='net.layer2').fm['net.layer2']
    torch.testing.assert_close(z, m.net.layer2(m.net.layer1(x)))
    assert z.requires_grad is not reentrant
    if not reentrant: assert torch.isfinite(torch.autograd.grad(z.sum(), m.net.layer1[0].weight)[0]).all()

class Early(DistillLoss):
    "Reads other inputs up to a layer"
    layers = ['layer1']
    def __init__(self, passes): self.passes = passes
    def forward(self, fm_s, student, teacher, xb):
        s,t = student(*xb, until='layer2'),teacher(*xb, until='layer2')
        self.passes.append((s,t))
        return s.fm['layer2'].mean()-t.fm['layer2'].mean()

def test_in_a_fit(teacher):
    passes = []
    learn = learner(cbs=KD(teacher, TaskLoss()+Early(passes).at('layer1')))
    learn.fit(1)
    for s,t in passes[1:]:
        assert [list(o.fm) for o in (s,t)]==[['layer1','layer2'],['layer2']]
        assert s.fm['layer2'].requires_grad and not t.fm['layer2'].requires_grad
    assert left(learn, teacher)==[]

def test_half_precision_and_float64():
    m,x = net(),X[:4]
    n = Net(m, x)
    n.at((x,), lambda: torch.autocast('cpu', torch.bfloat16))
    assert n(x, until='layer2').fm['layer2'].dtype==torch.float32
    m = net().double()
    for double,dtype in ((True,torch.float64),(False,torch.float32)):
        assert Net(m, x.double(), double=double)(x.double(), until='layer2').fm['layer2'].dtype==dtype
    assert copy.deepcopy(m).layer2 is not m.layer2
