"""Signals and volumes: on which side the channels are, as the module that made an activation says, and what losses make
of it. The other opinion: formulas by hand on what plain hooks saw."""
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from common import KD,At,HalfCPU,X,Y,assert_same,learner,left,refuses,seed,state,tuples
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses import (AB,FCFD,HCL,NST,OFA,OFD,SAD,TAS,VID,WKD,Attention,FitNet,InfoNCE,ReviewKD,
                                  windows)
from fasterdistill.networks.adapters import bridge,local_to_global,regressor
from fasterdistill.networks.exits import exit_head
from fasterdistill.networks.layouts import Sides,Stage,describe,from_map,pooled,to_map,told
from fasterdistill.networks.names import pair_layers
from fasterdistill.networks.net import Net
from fasterdistill.networks.record import look
from fasterdistill.networks.stages import stages
from fasterdistill.networks.taps import Taps
from fasterdistill.show import show_layers

conv,norm,pool = ((None,*o) for o in ((nn.Conv1d,nn.Conv2d,nn.Conv3d), (nn.BatchNorm1d,nn.BatchNorm2d,nn.BatchNorm3d),
                  (nn.AdaptiveAvgPool1d,nn.AdaptiveAvgPool2d,nn.AdaptiveAvgPool3d)))
layouts = {1:'NCL', 3:'NCDHW'}

def block(dims, ni, nf, stride):
    return nn.Sequential(conv[dims](ni, nf, 3, stride, 1), norm[dims](nf), nn.ReLU(inplace=True))

def net(dims, w=4, s=0):
    "Three stages of convolutions over as many dimensions"
    seed(s)
    return nn.Sequential(OrderedDict(
        layer1=block(dims, 1, w, 1), layer2=block(dims, w, 2*w, 2), layer3=block(dims, 2*w, 4*w, 2),
        pool=pool[dims](1), flat=nn.Flatten(), fc=nn.Linear(4*w, 10)))

class OnSignals(nn.Module):
    "A transformer of four blocks on stretches of a signal"
    def __init__(self, d=16, s=5):
        super().__init__()
        seed(s)
        self.patch = nn.Conv1d(1, d, 4, 4)
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(d, 2, 2*d, 0., batch_first=True, norm_first=True)
                                      for _ in range(4)])
        self.fc = nn.Linear(d, 10)
    def forward(self, x): return self.fc(self.blocks(self.patch(x).mT).mean(1))

inputs = {1: X[:160].flatten(2), 3: X[:160,:,None].expand(-1, -1, 4, -1, -1).contiguous()}
def dls(dims): return tuples(inputs[dims], Y[:160], drop_last=True)
class Caught(Exception): "Ends a fit before it has trained"

# ---- what the shape does not say ----

@pytest.mark.parametrize('dims', layouts)
def test_stages(dims):
    sides = {1: [(64,),(32,),(16,)], 3: [(4,8,8),(2,4,4),(1,2,2)]}[dims]
    want = [Stage(f'layer{i+1}', 4*2**i, size, layouts[dims]) for i,size in enumerate(sides)]
    assert stages(net(dims), inputs[dims][:4])==want
    assert [s.shape for s in want]==[(s.channels,*s.size) for s in want]
    assert pair_layers(net(dims), net(dims, 8, 1), inputs[dims][:4])==[(s.name,s.name) for s in want]

class Own(nn.Module):
    "A convolution, or a norm with the channels last, of its own weights"
    def __init__(self, last):
        super().__init__()
        self.last,self.bias = last,nn.Parameter(torch.zeros(6))
    def forward(self, z): return z+self.bias if self.last else z+self.bias[:,None]

first = [nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.AvgPool1d(1), nn.MaxPool1d(1),
         nn.AdaptiveAvgPool1d(9), nn.InstanceNorm1d(6), nn.ConvTranspose1d(6, 6, 1), Own(False)]
last = [nn.Linear(6, 6), nn.LayerNorm(6), nn.GRU(6, 6, batch_first=True), Own(True),
        nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)]

@pytest.mark.parametrize('module', first+last, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize('around', [lambda m: m, lambda m: nn.Sequential(m, nn.ReLU()) if type(m) is not nn.GRU else m])
def test_a_module_says_where_the_channels_are(module, around):
    "By its kind or the width of its weights; an activation function and a block return what lies as what went in"
    x = torch.randn(2, 6, 9) if module in first else torch.randn(2, 9, 6)
    model = around(module)
    rec = look(model, x)
    z = rec.calls[-1].out
    shape = (z if hasattr(z, 'shape') else z[0]).shape
    assert Sides(rec, x).at(rec.ends[-1], shape)==(module in first)
    assert Sides(rec, x).misread(rec.ends[-1], shape)==(True if module in first else None)

def test_as_long_as_wide():
    "As many channels as positions: the last one that made something so says it"
    x = torch.randn(2, 8, 8)
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Linear(8, 8), nn.Dropout())
    rec = look(model, x)
    assert [Sides(rec, x).at(end, (2,8,8)) for end in rec.ends]==[True,True,False,False,False]

def test_maps_where_the_input_is_no_picture():
    "A spectrum that is made inside of a network: ten channels, ten rows and twelve columns are not ten by ten"
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.fc = nn.Conv2d(1, 10, 3, 1, 1),nn.Linear(10, 3)
        def forward(self, x): return self.fc(self.conv(x.reshape(-1, 1, 10, 12)).mean((2,3)))
    x = torch.randn(4, 120)
    taps = Taps(Spectrum(), ['conv'], x)
    assert taps.first=={'conv':True}
    assert describe(told(torch.zeros(4, 10, 10, 12), True), x).channels==10
    assert show_layers(Spectrum(), x).set_index('layer').layout['conv']=='NCHW'

def test_pictures_keep_their_proportions():
    "What a picture becomes is told by its proportions, as ever"
    x = torch.randn(2, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1), nn.BatchNorm2d(5))
    assert Taps(model, ['0','1'], x).first=={}

def test_volumes_with_the_channels_last():
    x = torch.randn(2, 4, 8, 8, 3)
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU())
    taps = Taps(model, ['1','2'], x)
    assert taps.first=={'1':False, '2':False}
    z = told(torch.randn(2, 4, 8, 8, 6), False)
    st = describe(z)
    assert st==Stage('', 6, (4,8,8), 'NDHWC') and st.shape==(4,8,8,6)
    assert torch.equal(from_map(to_map(z), st), z) and torch.allclose(pooled(z), z.mean((1,2,3)), atol=1e-6)
    assert exit_head(z, 10)(z).shape==(2,10)

@pytest.mark.parametrize('dims', layouts)
def test_whoever_reads_a_network_is_told(dims):
    "By hand, in extra passes, and of what goes into a module; the network's own tensors are left alone"
    x,own = inputs[dims][:4],[]
    model = net(dims).eval()
    model.layer2.register_forward_hook(lambda m, args, out: own.append(out))
    n = Net(model, x, ['layer2','layer3:in'])
    for view in (n(x, bn='eval'), n.resume('layer1', model.layer1(x), bn='eval')):
        for z in view.fm.values(): assert describe(z).layout==layouts[dims] and describe(z).channels==8
    assert own and not any(hasattr(z, 'channels_first') for z in own)

# ---- losses ----

def seen_by_hooks(model, x, *names):
    "What layers return, in evaluation"
    maps = {}
    def keep(n): return lambda m, args, out: maps.update({n: out.detach().clone()})
    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    with torch.no_grad(): model.eval()(x)
    for h in handles: h.remove()
    return [maps[n] for n in names]

def looks(z):
    a = z.pow(2).sum(1).flatten(1)
    return a/a.norm(dim=1, keepdim=True)

by_hand = {
    'Attention': lambda s, t, loss: (looks(s)-looks(t)).pow(2).mean(),
    'InfoNCE': lambda s, t, loss: nce(s.flatten(2).mean(2), t.flatten(2).mean(2), loss.project[0]),
    'FitNet': lambda s, t, loss: (hints(s, loss.adapters[0].layers[0])-t).pow(2).mean()}

def nce(s, t, project):
    s,t = F.normalize(F.linear(s, project.weight, project.bias)),F.normalize(t)
    return F.cross_entropy(s@t.T/.07, torch.arange(len(s)))

def hints(s, c):
    "A convolution of one position, a norm that is new (mean 0, variance 1), what is negative left out"
    z = torch.einsum('oc,bc...->bo...', c.weight.flatten(1), s)
    return (z/(1+1e-5)**.5).relu()

@pytest.mark.parametrize('dims', layouts)
@pytest.mark.parametrize('make', [Attention,InfoNCE,FitNet], ids=lambda o: o.__name__)
def test_values_by_hand(dims, make):
    "Time is not taken for channels"
    learn,teacher = learner(net(dims), dls(dims), metrics=[]),net(dims, 8, 1)
    cb,got = KD(teacher, TaskLoss()+make().at('layer2')),{}
    def grab(l):
        got.update(values=cb.teaching.opening.values, x=l.xb[0].as_subclass(torch.Tensor).clone())
        raise Caught
    with pytest.raises(Caught): learn.fit(1, cbs=[cb,At('before_batch', grab)])
    x,term,value = got['x'],cb.loss.losses[1],[*got['values'].values()][1]
    (s,),(t,) = seen_by_hooks(learn.model, x, 'layer2'),seen_by_hooks(teacher, x, 'layer2')
    assert value==pytest.approx(by_hand[make.__name__](s, t, term).item(), rel=1e-5)

# ---- the same of pooled and of resized places ----

def hcl(s, t):
    "Each window of a side cut out by hand: the sides are powers of 2"
    def coarse(z, l):
        for d in range(2, z.ndim): z = torch.stack([o.mean(d) for o in z.chunk(l, d)], d)
        return z
    total,whole,w = (s-t).pow(2).mean(),1.,1.
    for l in (4,2,1):
        if l>=s.shape[2]: continue
        w /= 2
        total,whole = total+w*(coarse(s, l)-coarse(t, l)).pow(2).mean(),whole+w
    return total/whole

def shares(z): return (z.pow(2).sum(1).flatten(1)).softmax(1)

def wkd(s, t):
    s,t = s.flatten(2),t.flatten(2)
    sd = (s.var(2)+1e-5).sqrt()-(t.var(2)+1e-5).sqrt()
    return (4*(s.mean(2)-t.mean(2)).pow(2)+sd.pow(2)).sum(1).mean()

@pytest.mark.parametrize('sides', [(8,),(4,8,8)], ids=['signal','volume'])
def test_places_in_one_direction_or_three(sides):
    "Channels are not pooled, time is not taken for a picture"
    seed()
    s,t = (told(torch.randn(2, 6, *sides), True) for _ in range(2))
    torch.testing.assert_close(HCL()(fm_s={'a':s}, fm_t={'a':t}), hcl(s, t))
    torch.testing.assert_close(WKD(adapter=None)(fm_s={'a':s}, fm_t={'a':t}), wkd(s, t))
    assert len(windows(s, 2))==2**len(sides)
    want = (shares(s)-shares(t)).pow(2).sum(1).mean()
    torch.testing.assert_close(SAD(start=0)(fm_s={'a':s, 'b':t}), want)
    dist = torch.distributions.Normal(0., 5**.5)
    vid = VID()
    vid.build(fm_s={'a':s}, fm_t={'a':t})
    mean = vid.adapters[0].mean(s)
    nll = -dist.log_prob(mean-t).mean()-torch.log(torch.tensor(2*torch.pi))/2
    torch.testing.assert_close(vid(fm_s={'a':s}, fm_t={'a':t}), nll)
    want = (1-torch.where(t>0, s, -s)).clamp(min=0).pow(2).sum()/2
    torch.testing.assert_close(AB(adapter=None)(fm_s={'a':s}, fm_t={'a':t}), want)
    margins = -torch.rand(6)
    lifted = torch.maximum(t, margins.view(-1, *[1]*len(sides)))
    want = ((s-lifted).pow(2)*((s>lifted) | (lifted>0))).sum()/2
    torch.testing.assert_close(OFD([margins], adapter=None)(fm_s={'a':s}, fm_t={'a':t}), want)

every = dict(FitNet=FitNet, Attention=Attention, InfoNCE=InfoNCE, OFA=OFA, FCFD=FCFD, TAS=TAS,
             TAS_without=lambda: TAS(tail=False), AB=AB, OFD=OFD, VID=VID, WKD=WKD, NST=NST)

@pytest.mark.parametrize('dims', layouts)
@pytest.mark.parametrize('name', every)
def test_every_loss(dims, name):
    "Layers found, learned parts of as many dimensions, which move; the student is itself afterwards"
    learn,teacher = learner(net(dims), dls(dims), metrics=[]),net(dims, 8, 1)
    cb,was = KD(teacher, TaskLoss()+every[name]()),state(teacher)
    learn.fit(1, cbs=cb)
    term = cb.loss.losses[1]
    kinds = {type(m) for m in term.modules()}
    assert not kinds & {conv[2],norm[2],conv[4-dims],norm[4-dims]}
    if name not in ('Attention','InfoNCE','NST'): assert conv[dims] in kinds
    if name=='InfoNCE': assert (term.project[0].in_features,term.project[0].out_features)==(16,32)
    assert list(cb.history[0].values())[1]>0 and not left(learn, teacher)
    assert_same(was, state(teacher))

@pytest.mark.parametrize('name', ['FitNet','InfoNCE','OFA','FCFD','TAS','Attention','NST'])
@pytest.mark.parametrize('way', ['to a transformer','from a transformer'])
def test_signals_and_sequences(name, way):
    "A CNN and a transformer on signals meet, either way round"
    a,b = net(1),OnSignals()
    student,teacher = (a,b) if way=='to a transformer' else (b,a)
    learn,cb = learner(student, dls(1), metrics=[]),KD(teacher, TaskLoss()+every[name]())
    learn.fit(1, cbs=cb)
    assert list(cb.history[0].values())[1]>0 and not left(learn, teacher)

class WithClassToken(OnSignals):
    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
    def forward(self, x):
        z = self.patch(x).mT
        return self.fc(self.blocks(torch.cat([self.cls.expand(len(z), -1, -1), z], 1))[:,0])

@pytest.mark.parametrize('way', ['to a transformer','from a transformer'])
def test_where_both_look(way):
    "Sixteen tokens and thirty-two positions: each token is a stretch of four, each position one of two"
    a,b = (net(1),'layer2'),(OnSignals(),'blocks.1')
    (student,one),(teacher,other) = (a,b) if way=='to a transformer' else (b,a)
    learn = learner(student, dls(1), metrics=[])
    row = KD(teacher, TaskLoss()+Attention().at(one, other)).plan(learn).rows[1]
    x = inputs[1][:32]
    (signal,),(tokens,) = seen_by_hooks(a[0], x, 'layer2'),seen_by_hooks(b[0], x, 'blocks.1')
    short = torch.stack([signal[:,:,2*i:2*i+2].mean(2) for i in range(16)], 2)
    assert row.value==pytest.approx((looks(short)-looks(tokens.mT)).pow(2).mean().item(), rel=1e-5)

def test_refused_in_words():
    learn = learner(net(1), dls(1), metrics=[])
    says = '17 tokens lies beside a signal of 64 positions, and neither number divides the other: a token that is no '
    for loss in (Attention,NST): refuses(learn, says, KD(WithClassToken(), TaskLoss()+loss()))
    words = learner(OnSignals(), dls(1), metrics=[])
    refuses(words, 'a sequence without a grid', KD(OnSignals(s=1), TaskLoss()+Attention()))
    for dims in layouts:
        both = learner(net(dims), dls(dims), metrics=[])
        refuses(both, "'layer1:pre' is a signal or a volume", KD(net(dims, 8, 1), TaskLoss()+ReviewKD()))
    with pytest.raises(ValueError, match='places of one kind are compared'):
        Attention()(fm_s={'a': torch.randn(2,3,8,8)}, fm_t={'b': torch.randn(2,3,4,8,8)})
    for make in (regressor,bridge,local_to_global):
        with pytest.raises(ValueError, match=r'no \w+ (from|between)'):
            make(torch.randn(2,3,8,8), torch.randn(2,3,4,8,8))

@pytest.mark.parametrize('ratio', [.5,1,2,1.5])
@pytest.mark.parametrize('dims', [1,2,3])
def test_adapters_meet_sizes(dims, ratio):
    "Of any ratio, in as many dimensions"
    s = told(torch.rand(2, 3, *[8]*dims), True)
    t = told(torch.rand(2, 5, *[int(8*ratio)]*dims), True)
    for make in (regressor,bridge,local_to_global): assert make(s, t)(s).shape==t.shape, make

def test_half_precision():
    "What is lifted to single precision is still told"
    learn,loss = learner(net(1), dls(1), metrics=[]),TaskLoss()+InfoNCE().at('layer2')+FitNet().at('layer2')
    cb = KD(net(1, 8, 1), loss)
    learn.fit(1, cbs=[cb,HalfCPU()])
    assert cb.loss.losses[1].project[0].in_features==8
    assert isinstance(cb.loss.losses[2].adapters[0].layers[0], nn.Conv1d)
