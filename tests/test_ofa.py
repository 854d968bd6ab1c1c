"OFA by hand: its weights of the classes, its exits, and both in Learners of many kinds of networks"
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import KD,At,ViT,X,Y,attention,cpu,get_dls,learner,left,net,refuses,seed,tuples
from fastai.callback.mixup import CutMix,MixUp
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,LabelSmoothingCrossEntropyFlat,MSELossFlat
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.ofa import OFA,OFALogits
from fasterdistill.missing import MissingLabels
from fasterdistill.networks.exits import MapExit,TokenExit

def one(l, s, t, y):
    "`OFALogits` of one item by a loop: `s` and `t` its logits, `y` its class or None"
    es,et = [math.exp((o-max(s))/l.T) for o in s],[math.exp((o-max(t))/l.T) for o in t]
    res = 0.
    for c in range(len(s)):
        p,log_s = et[c]/sum(et),(s[c]-max(s))/l.T-math.log(sum(es))
        own,other = ((1+p)**l.gamma-1,p**l.gamma) if l.form=='code' else ((1+p)**l.gamma,p)
        res -= (own if c==y else other)*log_s
    return res

def each_item(l, s, t, ys): return [one(l, *o) for o in zip(s.tolist(), t.tolist(), ys, strict=True)]
def mean(l, s, t, ys): return np.mean(each_item(l, s, t, ys))

def near(a, b, tol=2e-5):
    a,b = (float(o.detach() if isinstance(o, torch.Tensor) else o) for o in (a,b))
    assert abs(a-b) <= tol*max(1., abs(b)), (a,b)

settings = [(1.,1.),(1.5,1.),(2.,4.)]
logits = [OFALogits(gamma=g, T=t, form=form) for g,t in settings for form in ('code','paper')]
each = pytest.mark.parametrize('l', logits, ids=repr)

# ---- labels of all kinds ----

@each
def test_labels(l):
    seed()
    s,t = torch.randn(2, 6, 5)*3
    y,y2,lam = torch.tensor([0,4,2,2,1,3]),torch.tensor([1,4,0,3,3,2]),torch.rand(6)
    hot,hot2 = F.one_hot(y, 5).float(),F.one_hot(y2, 5).float()
    a,b = (np.array(each_item(l, s, t, ys.tolist())) for ys in (y,y2))
    def loss(target=y, **mix): return l(pred=s, teacher_pred=t, target=target, **mix)
    near(loss(), a.mean())
    for o in (y[:,None].to(torch.int8),hot,hot.half()): near(loss(o), a.mean())   # a table's column; all on one class
    blend = np.mean(lam.numpy()*a+(1-lam.numpy())*b)
    for mine,other in ((y,y2), (hot,hot2)): near(loss(mine, mix=(other,lam)), blend)
    near(loss(lam[:,None]*hot+(1-lam[:,None])*hot2), blend)
    for k in (.3, torch.tensor(.3)): near(loss(mix=(y2,k)), np.mean(.3*a+.7*b))

@each
@pytest.mark.parametrize('criterion,no_label', [
    (None,-100), (nn.CrossEntropyLoss(),-100), (nn.CrossEntropyLoss(ignore_index=255),255),
    (CrossEntropyLossFlat(ignore_index=1),1)], ids=str)
def test_item_without_a_label(l, criterion, no_label):
    "As if no class were its own, and in the mean like any other"
    s,t = torch.randn(2, 4, 5)
    y = torch.tensor([0,no_label,2,no_label])
    near(l(pred=s, teacher_pred=t, target=y, criterion=criterion), mean(l, s, t, [0,None,2,None]))

def test_same_loss_without_labels():
    "At gamma 1 the authors' form reads none"
    s,t = torch.randn(2, 4, 5)
    y,soft = torch.arange(4),F.cross_entropy(s, t.softmax(1))
    near(OFALogits()(pred=s, teacher_pred=t, target=torch.full((4,), -100)), soft)
    near(OFALogits()(pred=s, teacher_pred=t, target=y), soft)
    near(OFALogits(form='paper')(pred=s, teacher_pred=t, target=y), soft+F.cross_entropy(s, y))

@each
@pytest.mark.parametrize('criterion,shape,axis,ignore', [
    (nn.CrossEntropyLoss(ignore_index=255), (3,5,4,6), 1, 255), (nn.CrossEntropyLoss(), (3,5,5,5), 1, -100),
    (nn.CrossEntropyLoss(), (3,5,7), 1, -100), (CrossEntropyLossFlat(axis=1, ignore_index=0), (3,5,4,6), 1, 0),
    (CrossEntropyLossFlat(axis=-1), (3,7,5), 2, -100), (None, (3,7,5), 2, -100)], ids=str)
def test_dense(l, criterion, shape, axis, ignore):
    "The mean over what is not ignored; nothing goes back to the rest"
    seed()
    s,t = torch.randn(2, *shape)
    s.requires_grad_()
    y = torch.randint(0, 5, shape[:axis]+shape[axis+1:])
    y[torch.rand(y.shape)<.3] = ignore
    def flat(o): return o.detach().movedim(axis, -1).reshape(-1, 5)
    keep = y.flatten()!=ignore
    v = l(pred=s, teacher_pred=t, target=y, criterion=criterion)
    near(v, mean(l, flat(s)[keep], flat(t)[keep], y.flatten()[keep].tolist()))
    g = flat(torch.autograd.grad(v, s)[0])
    assert not g[~keep].any()
    assert g[keep].any(1).all()
    assert 0<keep.sum()<len(keep)
    if criterion is not None: criterion(s, y)                                  # reads these shapes so too

def test_everything_ignored():
    s = torch.randn(2,5,3,3, requires_grad=True)
    v = OFALogits(1.5)(pred=s, teacher_pred=torch.randn(2,5,3,3), target=torch.full((2,3,3), -100))
    assert v==0 and not torch.autograd.grad(v, s)[0].any()

@each
def test_extreme(l):
    "Logits of ±50, on one side and on opposite sides, in float32"
    s = torch.tensor([[50.,-50,-50],[50,-50,50],[-50,-50,-50]], requires_grad=True)
    for t in (s.detach(), -s.detach(), torch.zeros(3, 3)):
        v = l(pred=s, teacher_pred=t, target=torch.tensor([0,1,2]))
        near(v, mean(l, s.detach(), t, [0,1,2]))
        assert torch.autograd.grad(v, s)[0].isfinite().all()

# ---- refusals ----

def z(*shape): return torch.randn(shape)
def two(*shape): return dict(pred=z(*shape), teacher_pred=z(*shape), target=torch.zeros(shape[:1]).long())

def dense_labels(*shape): return torch.zeros(shape).long()

pixels = two(2, 3, 4, 4)
bad_inputs = [
    (dict(two(4, 3), target=z(4, 3), criterion=BCEWithLogitsLossFlat()), 'yes-or-no outputs; use BinarySoftTarget'),
    (dict(two(4, 3), target=z(4, 3), criterion=MSELossFlat()), 'regression; use Logits'),
    (two(4, 1), r'one number an item, \(4, 1\)'),
    (two(4), r'one number an item, \(4,\)'),
    (two(2, 1, 4, 4), r'\(2, 1, 4, 4\)'),
    (dict(two(4, 3), teacher_pred=z(4, 5)), r'\(4, 3\).*\(4, 5\).*Frozen\(teacher, classes='),
    (dict(two(4, 3), target=z(4)), r'labels of shape \(4,\) .*expected a class for each'),
    (dict(two(4, 3), target=torch.zeros(4, 3).long()), r'labels of shape \(4, 3\)'),
    (dict(two(4, 3), target=z(4, 5)), r'labels of shape \(4, 5\)'),
    (dict(two(4, 3), mix=(z(4),.5)), r'labels of shape \(4,\)'),
    (dict(pixels, target=dense_labels(2, 4, 4), mix=(dense_labels(2, 4, 4),.5)), 'without MixUp and CutMix.*mixed'),
    (dict(pixels, target=z(2, 3, 4, 4)), r'integer label.*\(2, 3, 4, 4\), not integers'),
    (dict(pixels, target=dense_labels(2, 8, 8)), r'\(2, 8, 8\) for 32 pixels')]

@pytest.mark.parametrize('given,match', bad_inputs, ids=lambda o: o if isinstance(o, str) else '')
def test_refused(given, match):
    with pytest.raises(ValueError, match=match): OFALogits()(**given)

@pytest.mark.parametrize('cls', [OFALogits,OFA])
@pytest.mark.parametrize('bad', [
    dict(gamma=0), dict(gamma=-1.), dict(gamma=float('nan')), dict(gamma=float('inf')), dict(gamma='1'), dict(T=0),
    dict(form='Code')], ids=str)
def test_refused_arguments(cls, bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))): cls(**bad)
    if cls is OFA and 'gamma' in bad:
        with pytest.raises(ValueError, match='expected a positive number'): OFA(gamma=[1.,bad['gamma']])

def dense(classes):
    "A class for each pixel"
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(8, classes, 1))
def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

unsuitable = [                                         # loss, network, data, the Learner's loss function, what is said
    (OFA(), net, partial(tuples, X, F.one_hot(Y, 10).float()), BCEWithLogitsLossFlat(),
     r'OFA\(\) needs one class.*BinarySoftTarget'),
    (OFA(), partial(net, classes=2), partial(tuples, X, torch.stack([Y,Y], 1).float()), MSELossFlat(),
     r'OFA\(\) needs one class.*Logits'),
    (OFA(), partial(net, classes=1), partial(tuples, X, torch.zeros_like(Y)), CrossEntropyLossFlat(),
     r'OFA\(\) needs one class.*\(32, 1\)'),
    (OFA(), partial(dense, 3), partial(tuples, X, (X[:,0]>.5).long()), nn.CrossEntropyLoss(),
     r'exits to one answer.*For dense predictions OFALogits'),
    (OFA(gamma=[1,1,1]), net, get_dls, None, '3 values of gamma for 3 exits.*expected one, or 4'),
    (OFA(gamma=[]), net, get_dls, None, '0 values of gamma'),
    (OFA(), flat, get_dls, None, 'no stages')]

@pytest.mark.parametrize('loss,model,dls,loss_func,match', unsuitable, ids=[
    'multi-label','regression','one output','dense','gammas','no gammas','no stages'])
def test_refused_before_anything_is_trained(loss, model, dls, loss_func, match):
    learn = learner(model(), dls(), loss_func=loss_func, metrics=[])
    refuses(learn, match, KD(model(), TaskLoss()+loss))

# ---- mixed labels, smoothed labels, no labels, in a Learner ----

def plain(o): return o.detach().as_subclass(torch.Tensor)

def watched(teacher, l, cbs=(), **kwargs):
    "Of each batch the term's value, and what it is computed from"
    seen = []
    def look(learn):
        if not learn.training: return
        with torch.no_grad(): t = teacher.eval()(learn.x)
        mixer = next((getattr(learn, n) for n in ('mix_up','cut_mix') if hasattr(learn, n)), None)
        mix = mixer and (mixer.yb1[0],mixer.lam.expand(len(learn.y)))
        seen.append((learn.knowledge_distillation.parts['ofa_logits'],plain(learn.pred),plain(t),learn.y.clone(),mix))
    learn = learner(cbs=[KD(teacher, TaskLoss()+l),At('after_loss', look)], **kwargs)
    learn.fit(2, .05, cbs=list(cbs))
    assert len(seen)==6
    return seen

@pytest.mark.parametrize('mixer', [MixUp,CutMix])
@pytest.mark.parametrize('l', logits[2:4], ids=repr)
def test_mixed(teacher, l, mixer):
    "lam times the loss of the first labels and the rest of the second, item by item"
    lams = []
    for got,s,t,y,(y2,lam) in watched(teacher, l, [mixer(.8)]):
        first,second = (np.array(each_item(l, s, t, o.tolist())) for o in (y,y2))
        near(got, np.mean(lam.numpy()*first+(1-lam.numpy())*second))
        lams += lam.tolist()
    assert min(lams)<.95
    assert max(lams)>.5

def test_smoothed(teacher):
    "fastai's label smoothing is in the loss function; here the labels are whole"
    l = OFALogits(1.5)
    for got,s,t,y,_ in watched(teacher, l, loss_func=LabelSmoothingCrossEntropyFlat()):
        near(got, mean(l, s, t, y.tolist()))

@pytest.mark.parametrize('no_label', [-100,255])
def test_missing_labels(teacher, no_label):
    l,labels = OFALogits(1.5),Y.clone()
    labels[:96:3] = no_label
    for got,s,t,y,_ in watched(teacher, l, [MissingLabels(no_label)], dls=tuples(X, labels)):
        assert (y==no_label).any()
        near(got, mean(l, s, t, [None if o==no_label else o for o in y.tolist()]))

def test_missing_soft_labels(teacher):
    l,labels = OFALogits(1.5),F.one_hot(Y, 10).float()
    labels[:96:3] = float('nan')
    seen = watched(teacher, l, [MissingLabels()], dls=tuples(X, labels), loss_func=nn.CrossEntropyLoss(), metrics=[])
    for got,s,t,y,_ in seen: near(got, mean(l, s, t, [None if o.isnan().any() else int(o.argmax()) for o in y]))

# ---- the exits ----

def exits(shapes, size=None, classes=7, **kwargs):
    "Those that OFA builds for activations of these shapes, of pictures of this size"
    loss,x = OFA(**kwargs),None if size is None else (torch.zeros(2, 3, size, size),)
    loss.build(fm_s={f'{i}': torch.randn(o) for i,o in enumerate(shapes)}, pred=torch.zeros(2, classes), xb=x)
    return list(loss.heads)

def separable(a, b):
    "Two depthwise convolutions, the first strided, each with one that mixes: in, out, kernel, stride, groups"
    return [(a,a,3,2,a),(a,a,1,1,1),(a,a,3,1,a),(a,b,1,1,1)]

def shape_of(c): return c.in_channels,c.out_channels,c.kernel_size[0],c.stride[0],c.groups

@pytest.mark.parametrize('width', [None,100])
def test_exits_of_maps(width):
    """4-k pairs at stage k: every first depthwise convolution halves the size, every pair doubles the width,
    the last goes to the width of the last stage"""
    heads,last = exits([(2,8,32,32),(2,16,16,16),(2,32,8,8),(2,64,4,4)], width=width),width or 64
    for k,h in enumerate(heads, 1):
        assert isinstance(h, MapExit)
        convs = [shape_of(o) for o in h.neck if isinstance(o, nn.Conv2d)]
        if k==4: assert convs==[(64,last,1,1,1)]
        else:
            widths = [8*2**(k-1+i) for i in range(4-k)]+[last]
            assert convs==[o for a,b in zip(widths, widths[1:]) for o in separable(a, b)]
            assert [type(o) for o in h.neck][:4]==[nn.Conv2d,nn.Conv2d,nn.BatchNorm2d,nn.ReLU]
        assert (h.fc.in_features,h.fc.out_features)==(last,7)
        m = nn.Sequential(*list(h.neck)[:-2])(torch.randn(2, 8*2**(k-1), 64>>k, 64>>k))
        assert m.shape==(2,last,4,4)                                            # all meet at the last stage's size

swin_shapes = [(2,56>>i,56>>i,8*2**i) for i in range(4)]

@pytest.mark.parametrize('shapes,size,merges,blocks,prefix,width', [
    (swin_shapes, 224, [3,2,1,0], [3,2,1,1], 0, 64), ([(2,197,12)]*4, 224, [1]*4, [3,2,1,1], 1, 12),
    ([(2,196,12)]*4, 224, [1]*4, [3,2,1,1], 0, 12), ([(2,17,12)]*3, 8, [0]*3, [2,1,1], 1, 12),
    ([(2,198,12)]*2, 224, [1]*2, [1,1], 2, 12)], ids=['swin','vit','mixer','small-vit','deit-distilled'])
def test_exits_of_tokens(shapes, size, merges, blocks, prefix, width):
    heads = exits(shapes, size)
    assert all(isinstance(h, TokenExit) for h in heads)
    assert [len(h.neck.merges) for h in heads]==merges
    assert [len(h.neck.blocks) for h in heads]==blocks
    assert {h.neck.stage.prefix for h in heads}=={prefix}
    for h,s in zip(heads, shapes):
        assert h(torch.randn(s)).shape==(2,7)
        for i,m in enumerate(h.neck.merges):
            assert m.linear.weight.shape==(width,4*(s[-1] if i==0 else width))
            assert m.linear.bias is None
        assert h.fc.weight.shape==(7,width)
        attentions = [(b.self_attn.embed_dim,b.self_attn.num_heads,b.norm_first) for b in h.neck.blocks]
        assert set(attentions)=={(width,4,True)}

def logits_of(h, z): return z@h.fc.weight.T+h.fc.bias

def test_class_token_goes_around_the_merge():
    "Without its blocks an exit answers with the class token as it was, or with the mean of the merged tokens"
    (h,),x = exits([(2,197,12)], 224),torch.randn(2, 197, 12)
    h.neck.blocks = nn.Identity()
    torch.testing.assert_close(h(x), logits_of(h, x[:,0]))

    (h,),x = exits([(2,196,12)], 224),torch.randn(2, 196, 12)
    h.neck.blocks = nn.Identity()
    grid = x.reshape(2, 7, 2, 7, 2, 12)                                     # (row, which of two, column, which of two)
    four = torch.cat([grid[:,:,a,:,b] for b in (0,1) for a in (0,1)], -1)
    norm = (four-four.mean(-1, keepdim=True))/(four.var(-1, unbiased=False, keepdim=True)+1e-5).sqrt()
    merged = (norm@h.neck.merges[0].linear.weight.T).mean((1,2))
    torch.testing.assert_close(h(x), logits_of(h, merged), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('shape,others,size', [
    ((2,8,16,16), [(3,8,24,24),(3,8,9,13),(2,8,1,1)], 64), ((2,14,14,8), [(3,28,28,8),(3,21,21,8)], 56),
    ((2,196,8), [(3,256,8),(3,784,8)], 224)], ids=['map','channels-last','tokens'])
def test_sizes_may_change(shape, others, size):
    for h in exits([shape]*2, size):
        for o in others: assert h(torch.randn(o)).shape==(o[0],7)

def test_no_exit():
    message = r'no exit from an activation of shape \(2, 3, 4, 5, 6, 7\)'
    with pytest.raises(ValueError, match=message): exits([(2,3,4,5,6,7)])
    with pytest.raises(RuntimeError, match=r'OFA\(gamma=1.5\).*needs build'): OFA(gamma=1.5)(fm_s={}, **two(4, 3))

def again(model, loss, x):
    "What the exits and the network answer in the pass that just was, without moving an average"
    bns = [m for o in (model,loss) for m in o.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in bns: m.momentum = 0.
    maps = []
    with torch.no_grad():
        for n,m in model.named_children():
            x = m(x)
            if n.startswith('layer'): maps.append(x.clone())
        answers = [h(o) for h,o in zip(loss.heads, maps, strict=True)]+[x]
    for m in bns: m.momentum = .1
    return answers

@pytest.mark.parametrize('kwargs', [
    dict(), dict(exits=.1), dict(gamma=[1,1.2,1.4,2.], exits=.3, final=2.), dict(gamma=1.5, T=2., form='paper')],
    ids=str)
def test_total(teacher, kwargs):
    "final·(prediction) + exits·(sum over the exits), of each what a loop makes of its logits"
    loss,seen = OFA(**kwargs),[]
    gammas = kwargs.get('gamma', 1.)
    if not isinstance(gammas, list): gammas = [gammas]*4
    def look(learn):
        if not learn.training: return
        x,y = plain(learn.x),learn.y.tolist()
        with torch.no_grad(): t = teacher.eval()(x)
        losses = [OFALogits(g, kwargs.get('T', 1.), kwargs.get('form', 'code')) for g in gammas]
        *exits,final = [mean(l, o, t, y) for l,o in zip(losses, again(learn.model, loss, x), strict=True)]
        p = learn.knowledge_distillation.parts
        near(p['ofa'], kwargs.get('final', 1.)*final+kwargs.get('exits', 1.)*sum(exits))
        near(p['ofa_final'], final)
        near(p['ofa_exits'], sum(exits)/3)
        seen.append(p['ofa'])
    learn = learner(cbs=[KD(teacher, TaskLoss()+loss),At('after_loss', look)])
    learn.fit(2, .05)
    assert len(seen)==6
    assert left(learn, teacher)==[]

def test_head_of_ones_own(teacher):
    made = []
    def head(z, classes, width, left, xb=None):
        made.append((tuple(z.shape),classes,width,left,tuple(xb[0].shape)))
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(z.shape[1], classes))
    loss = OFA(head=head).at(['layer1','layer3'])
    learner(cbs=KD(teacher, TaskLoss()+loss)).fit(1, .05)
    assert made==[((32,4,8,8),10,16,1,(32,1,8,8)),((32,16,2,2),10,16,0,(32,1,8,8))]
    assert len(loss.heads)==2

# ---- students of all kinds ----

def cnn(): return net(8, s=1)
def vit(): return ViT(8)
def vit_without_token(): return ViT(12, cls=False)

def swin():
    timm = pytest.importorskip('timm')
    return timm.models.swin_transformer.SwinTransformer(
        img_size=8, patch_size=1, in_chans=1, num_classes=10, embed_dim=12, depths=(1,1), num_heads=(1,2),
        window_size=4)
def mixer():
    timm = pytest.importorskip('timm')
    return timm.models.mlp_mixer.MlpMixer(
        num_classes=10, img_size=8, in_chans=1, patch_size=2, num_blocks=4, embed_dim=8)

@pytest.mark.parametrize('model,kind,n,prefix', [
    (net,MapExit,3,None), (vit,TokenExit,4,1), (mixer,TokenExit,4,0), (swin,TokenExit,2,0)],
    ids=['cnn','vit','mixer','swin'])
@pytest.mark.parametrize('goal', [cnn,vit_without_token], ids=['from-cnn','from-vit'])
def test_students(model, kind, n, prefix, goal):
    seed(1)
    goal = goal()
    seed(2)
    loss = OFA(gamma=1.2, exits=.5)
    kd = KD(goal, TaskLoss()+loss)
    learn = learner(model(), cbs=kd)
    keys,moved = list(learn.model.state_dict()),{}
    def note(l): moved.update({k: bool(p.grad.any()) for k,p in loss.named_parameters()})
    def last_bias(): return list(loss.heads[0].parameters())[-1].detach().clone()      # of the linear layer at the end
    learn.fit(1, .01, cbs=At('before_step', note))
    bias,first = last_bias(),kd.history[0]['ofa']
    learn.fit(1, .01)

    assert len(loss.heads)==n
    assert all(isinstance(h, kind) for h in loss.heads)
    if prefix is not None: assert {h.neck.stage.prefix for h in loss.heads}=={prefix}
    assert all(math.isfinite(v) for v in kd.history[0].values())
    assert kd.history[0]['ofa']<first
    assert moved.keys()=={k for k,_ in loss.named_parameters()}
    assert all(moved.values())
    assert not torch.equal(bias, last_bias())
    assert left(learn, goal)==[]
    assert list(learn.model.state_dict())==keys

class Reader(nn.Module):
    "Words of a text, two layers, the mean"
    def __init__(self, d=8):
        super().__init__()
        self.words,self.enc1,self.enc2,self.fc = nn.Embedding(17, d),attention(d),attention(d),nn.Linear(d, 10)
    def forward(self, x): return self.fc(self.enc2(self.enc1(self.words(x))).mean(1))

def same_twice(items):
    "Loaders that train and validate with the same, in their order"
    return DataLoaders(*(DataLoader(items, bs=32, device=cpu, num_workers=0) for _ in range(2)))

def test_texts():
    "A sequence of one batch is no grid, and the next may have another length"
    def text(i): return X[i,0,:1+i//32].mul(16).long().flatten(),Y[i]                  # of 8 and of 16 words
    seed()
    goal,loss,seen = Reader(12),OFA().at(['enc1','enc2']),[]
    learn = learner(Reader(), same_twice([text(i) for i in range(64)]), cbs=KD(goal, TaskLoss()+loss))
    def note(l):
        if l.training: seen.append((l.x.shape[1],math.isfinite(l.knowledge_distillation.parts['ofa'])))
    learn.fit(2, .05, cbs=At('after_loss', note))
    assert seen==[(8,True),(16,True)]*2
    assert left(learn, goal)==[]
    assert [(h.neck.stage.size,len(h.neck.merges)) for h in loss.heads]==[((8,),0)]*2

def test_progressive_resizing(teacher):
    "A second fit at twice the size goes on with the same exits"
    loss = OFA()
    kd = KD(teacher, TaskLoss()+loss)
    learn = learner(dls=tuples(X, Y), cbs=kd)
    learn.fit(1, .05)
    heads = list(loss.heads)
    learn.dls = tuples(F.interpolate(X[:160], scale_factor=2), Y)
    learn.fit(2, .05)
    assert list(loss.heads)==heads
    assert all(math.isfinite(h['ofa']) for h in kd.history)
    assert kd.history[-1]['ofa']<kd.history[0]['ofa']
    assert left(learn, teacher)==[]

def test_last_batch_of_one():
    "Maps of one position and one item give BatchNorm nothing to average over: the batch goes without the term"
    goal,terms = net(8, bn=False, s=1),[]
    data = tuples(X[...,2:6,2:6], Y, n=33, valid=32)
    learn = learner(net(bn=False), data, cbs=KD(goal, TaskLoss()+OFA()))
    def note(l):
        if l.training: terms.append(set(l.knowledge_distillation.parts))
    learn.fit(1, .05, cbs=At('after_loss', note))
    assert 'ofa' in terms[0]
    assert 'ofa' not in terms[1]
    assert len(terms)==2

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_by_hand_on_a_gpu():
    loss = OFA(gamma=1.2)
    fm = dict(a=torch.randn(4, 6, 8, 8, device='cuda'), b=torch.randn(4, 17, 12, device='cuda'))
    given = {k: v.cuda() for k,v in two(4, 5).items()}
    loss.build(fm_s=fm, pred=given['pred'])
    v = loss(fm_s=fm, **given, mix=(given['target'].flip(0),torch.rand(4, device='cuda')))
    assert v.is_cuda
    assert v.isfinite()
