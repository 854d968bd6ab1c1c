"Batches whose input is a dict, a list or a list of pictures: copied, flipped, measured and counted as tensors are"
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from common import KD,X,Y,assert_same,cpu,in_float64,learner,left,net,real,refuses,seed,state
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn
from torch.utils.data import DataLoader as TorchLoader

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.losses.ofa import OFA
from fasterdistill.losses.tas import TAS
from fasterdistill.networks.net import Net
from fasterdistill.networks.cuts import flipped
from fasterdistill.networks.record import cloned,each,look,n_items,plain,tupled
from fasterdistill.networks.stages import stages
from fasterdistill.show import show_layers
from fasterdistill.teachers.teacher import Frozen

# ---- the same pictures in four wrappings ----

class Wrapped(nn.Module):
    "A network that takes its pictures out of what it is given"
    def __init__(self, m, how):
        super().__init__()
        self.m,self.how = m,how
    def forward(self, *xb): return self.m(takes[self.how](*xb))

takes = {'tensor': lambda x: x, 'dict': lambda d: d['image']*d['mask'], 'list': lambda o: o[0]*o[1],
         'nested': lambda d: d['views'][0]*d['views'][1], 'pictures': lambda o: torch.stack(list(o))}

def wrap(x, how):
    "One item"
    ones = torch.ones_like(x)
    return {'tensor':x, 'dict':dict(image=x, mask=ones), 'list':[x,ones], 'nested':dict(views=(x,ones), name='digit'),
            'pictures':x}[how]

def pictures(items): return [x for x,*_ in items],torch.stack([y for _,y in items])
def data(how, labels=True, n=96, bs=32):
    seed()
    items = [(wrap(x, how),*([y] if labels else [])) for x,y in zip(real(X[:n+32]), Y[:n+32], strict=True)]
    if how=='pictures': return DataLoaders(*(TorchLoader(o, bs, collate_fn=pictures) for o in (items[:n],items[n:])))
    res = DataLoaders(*(DataLoader(o, bs=bs, num_workers=0, device=cpu) for o in (items[:n],items[n:])))
    res.n_inp = 1
    return res

hows = ['dict','list','nested','pictures']
def after(how, loss, cbs=(), **kwargs):
    "The student's weights after a fit, and the parts of the last batch"
    student,teacher = Wrapped(net(), how),Wrapped(net(8, s=1), how)
    learn = learner(student, data(how, **kwargs), loss_func=nn.CrossEntropyLoss(), metrics=[], cbs=KD(teacher, loss()))
    seed(3)
    learn.fit(2, cbs=list(cbs))
    assert left(learn, teacher)==[]
    return state(student.m),learn.knowledge_distillation

losses = dict(SoftTarget=SoftTarget, FitNet=lambda: TaskLoss()+FitNet(), Attention=lambda: TaskLoss()+Attention(),
              FCFD=lambda: TaskLoss()+FCFD(), TAS=lambda: TaskLoss()+TAS(), OFA=lambda: TaskLoss()+OFA(),
              InfoNCE=lambda: TaskLoss()+InfoNCE())

@lru_cache
def plainly(loss): return after('tensor', losses[loss])

@pytest.mark.parametrize('how', hows)
@pytest.mark.parametrize('loss', losses)
def test_every_wrapping_is_the_tensor(loss, how):
    "To the last bit: layers found, cuts, learned parts, steps"
    a,kd = plainly(loss)
    b,other = after(how, losses[loss])
    assert_same(a, b)
    assert kd.history==other.history

@pytest.mark.parametrize('how', hows[:3])
def test_without_labels(how):
    "The number of items is that of the inputs"
    assert_same(after('tensor', SoftTarget, labels=False)[0], after(how, SoftTarget, labels=False)[0])

@pytest.mark.parametrize('how', hows[:3])
def test_which_items(how):
    "A last batch of five, and a loss that looks at which items are in it"
    seen = []
    class Which(DistillLoss):
        def forward(self, pred, idx):
            seen.append(idx.tolist())
            return 0*pred.sum()
    after(how, lambda: TaskLoss()+Which(), n=69)
    assert seen[0]==list(range(32))                                         # the trial
    assert [len(o) for o in seen[1:4]]==[32,32,5] and seen[3]==[*range(64,69)]

@pytest.mark.parametrize('how', hows)
def test_plan_and_layers(how):
    student,teacher = Wrapped(net(), how),Wrapped(net(8, s=1), how)
    learn = learner(student, data(how), loss_func=nn.CrossEntropyLoss(), metrics=[])
    plan = KD(teacher, TaskLoss()+FCFD()).plan(learn)
    assert [r.layers for r in plan.rows][1]==[f'm.layer{i} ({c}, {k}, {k}) → m.layer{i} ({2*c}, {k}, {k})'
                                             for i,c,k in ((1,4,8),(2,8,4),(3,16,2))]
    xb = learn.dls.one_batch()[:1] if hasattr(learn.dls.train, 'one_batch') else next(iter(learn.dls.train))[:1]
    assert [s.name for s in stages(student, tuple(xb))]==['m.layer1','m.layer2','m.layer3']
    table = show_layers(student, tuple(xb), cuts=True)
    assert set(table[table.stage!=''].cut)=={'yes'}

class Sized(nn.Module):
    "Pictures of their own sizes each, brought to one"
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, o): return self.m(torch.cat([F.interpolate(x[None], (8,8)) for x in o]))

def sized(n=96):
    xs = [F.interpolate(x[None], (8+i%3,8+i%2))[0] for i,x in enumerate(real(X[:n+32]))]
    items = list(zip(xs, Y[:n+32], strict=True))
    return DataLoaders(*(TorchLoader(o, 32, collate_fn=pictures) for o in (items[:n],items[n:])))

@in_float64
@pytest.mark.parametrize('loss', ['FitNet','FCFD'])
def test_pictures_of_other_sizes(loss):
    "As if they had been brought to one size before"
    def fit(dls, wrap):
        student,teacher = wrap(net()),wrap(net(8, s=1))
        learn = learner(student, dls, loss_func=nn.CrossEntropyLoss(), metrics=[], cbs=KD(teacher, losses[loss]()))
        seed(3)
        learn.fit(1)
        return torch.cat([p.detach().flatten() for p in student.parameters()])
    a = fit(sized(), Sized)
    same = [[(F.interpolate(x[None], (8,8))[0],y) for x,y in dl.dataset] for dl in sized().loaders]
    b = fit(DataLoaders(*(TorchLoader(o, 32) for o in same)), nn.Sequential)
    assert (a-b).abs().max()<1e-10

# ---- the teacher's inputs ----

@pytest.mark.parametrize('how', ['dict','nested'])
def test_a_teacher_that_takes_a_part(how):
    "Only the picture, normalised as it was trained and larger"
    student,teacher = Wrapped(net(), how),net(8, s=1)
    learn = learner(student, data(how), loss_func=nn.CrossEntropyLoss(), metrics=[])
    seen = []
    handle = teacher.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    learn.fit(1, cbs=KD(Frozen(teacher, inputs=takes[how], mean=[.5], std=[.25], size=12), SoftTarget()))
    handle.remove()
    want = F.interpolate((X[:32]-.5)/.25, (12,12), mode='bilinear', antialias=True)
    assert (seen[0]-want).abs().max()<1e-5

def test_a_list_of_pictures_is_normalised_one_by_one():
    teacher = Wrapped(net(8, s=1), 'pictures')
    learn = learner(Wrapped(net(), 'pictures'), data('pictures'), loss_func=nn.CrossEntropyLoss(), metrics=[])
    seen = []
    handle = teacher.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    learn.fit(1, cbs=KD(Frozen(teacher, mean=[.5], std=[.25], size=12), SoftTarget()))
    handle.remove()
    assert len(seen[0])==32 and seen[0][0].shape==(1,12,12)
    want = F.interpolate((X[:32]-.5)/.25, (12,12), mode='bilinear', antialias=True)
    assert (torch.stack(seen[0])-want).abs().max()<1e-5

@pytest.mark.parametrize('kwargs', [dict(mean=[.5], std=[.25]),dict(size=12)], ids=['mean','size'])
def test_what_of_a_dict_is_normalised(kwargs):
    teacher = Wrapped(net(8, s=1), 'dict')
    learn = learner(Wrapped(net(), 'dict'), data('dict'), loss_func=nn.CrossEntropyLoss(), metrics=[])
    refuses(learn, "the teacher's first input is a dict, in which what to normalise or resize cannot be told",
            KD(Frozen(teacher, **kwargs), SoftTarget()), teachers=[teacher])

# ---- the words themselves ----

class Sub(torch.Tensor): pass

def test_each():
    x = dict(a=torch.ones(2), b=[None,'text',torch.zeros(3).as_subclass(Sub)])
    made = each(plain, x)
    assert type(made['b'][2]) is torch.Tensor and made['b'][:2]==[None,'text'] and made['a'] is x['a']
    assert each(plain, made) is made and tupled(made)[0] is made
    copy, = cloned([x])
    copy['a'][0] = copy['b'][2][0] = 7
    assert x['a'][0]==1 and x['b'][2][0]==0

def test_flipped():
    "Pictures upside down, mirrored and in another order; categories by item; single numbers as they are"
    image,codes = torch.arange(8.).reshape(2,1,2,2),torch.tensor([[1,2],[3,4]])
    got, = flipped([dict(image=image, codes=codes, size=torch.tensor(3), other=None)])
    assert got['image'].flatten().tolist()==[7,6,5,4,3,2,1,0] and got['codes'].tolist()==[[3,4],[1,2]]
    assert got['size']==3 and got['other'] is None

z = torch.zeros
@pytest.mark.parametrize('xb,out,n', [
    ((z(5,3,8,8),), None, 5), ((None,z(5,2)), None, 5), ((dict(size=z(()), image=z(5,1,8,8)),), None, 5),
    (([z(5,3,8,8),z(5,8,8)],), None, 5), (([z(3,8,9),z(3,7,8)],), None, 2), (([z(4),z(9),z(2)],), None, 3),
    (([z(3,8,8),z(3,8,8)],), z(2,10), 2), (([z(3,8,8),z(3,8,8)],), z(3,10), 3), (([['a','b','c']]), None, 3)],
    ids=['tensor','left out','dict','inputs','pictures','unequal','by the output','by the output 2','texts'])
def test_how_many(xb, out, n): assert n_items(xb, out)==n

def test_nothing_tells():
    with pytest.raises(ValueError, match='the inputs of a batch are int, NoneType: how many items'): n_items((3,None))

def test_fewer_items_from_a_cut():
    "Resumed with two of the items, from a dict and from a list of pictures"
    for how in ('dict','pictures'):
        m = Wrapped(net(), how).eval()
        x = torch.stack(list(X[:5]))
        xb = {'dict':dict(image=x, mask=torch.ones_like(x)), 'pictures':list(x)}[how]
        network = Net(m, (xb,))
        part = m.m.layer2(m.m.layer1(x[:2]))
        assert (network.resume('m.layer2', part, bn='eval').pred-m.m(x[:2])).abs().max()<1e-6
        assert look(m, (xb,)).n==5
