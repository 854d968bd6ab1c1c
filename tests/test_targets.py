"Which labels a loss reads: of several targets, and of labels those that count"
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import KD,X,Y,in_float64,learner,left,loud,net,real,refuses,seed,tuples
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterdistill.fit.batch import belonging
from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.logits import BinarySoftTarget,SoftTarget
from fasterdistill.losses.ofa import OFALogits
from fasterdistill.missing import MissingLabels
from fasterdistill.task import ignored_label,task_kind
from fasterdistill.teachers.teacher import Frozen

# ---- two heads, two targets ----

class Heads(nn.Module):
    "A digit, and what is left when it is divided by three; as a tuple or as a dict"
    def __init__(self, w=4, s=0, names=None):
        super().__init__()
        self.net = net(w, 16, s=s)
        self.digit,self.rest,self.names = nn.Linear(16, 10),nn.Linear(16, 3),names
    def forward(self, x):
        z = self.net(x)
        both = self.digit(z),self.rest(z)
        return both if self.names is None else dict(zip(self.names, both, strict=True))

def both(p, y, z):
    p = list(p.values()) if isinstance(p, dict) else p
    return F.cross_entropy(p[0], y)+F.cross_entropy(p[1], z)

def two_targets(y=Y[:160], z=Y[:160]%3):
    dls = tuples(X[:160], y, z)
    dls.n_inp = 1
    return dls

class OnLabels(DistillLoss):
    def forward(self, pred, target): return F.cross_entropy(pred, target)

def planned(cb, dls=None, student=None, loss=both):
    learn = learner(student or Heads(), dls or two_targets(), loss_func=loss, metrics=[], cbs=cb)
    return learn,learn.knowledge_distillation.plan().rows[-1].value

@pytest.mark.parametrize('output', [1,-1,lambda o: o[1]], ids=['1','-1','function'])
def test_the_target_in_the_heads_place(output):
    learn,value = planned(KD(None, TaskLoss()+OnLabels(), output=output))
    want = F.cross_entropy(learn.model.eval()(X[:32])[1], Y[:32]%3)
    assert value==pytest.approx(want.item(), rel=1e-6)

@pytest.mark.parametrize('output,target,want', [(0,None,0),(1,0,None),(0,1,1),('rest',None,1),('rest',-1,1),
    ('digit',lambda yb: yb[1],1)], ids=['first','said first','said second','a key','said last','function'])
def test_said(output, target, want):
    names = ('digit','rest') if isinstance(output, str) else None
    cb = KD(None, TaskLoss()+OnLabels(), output=output, target=target)
    if want is None: return refuses(learner(Heads(names=names), two_targets(), loss_func=both, metrics=[]),
                                    '3, 4, 5, 6, 7 and 2 more is none of the 3 classes', cb)
    learn,value = planned(cb, student=Heads(names=names))
    raw = learn.model.eval()(X[:32])
    assert value==pytest.approx(F.cross_entropy(raw[output], (Y,Y%3)[want][:32]).item(), rel=1e-6)

def named_targets():
    from fastai.data.core import DataLoaders
    items = [(x,dict(rest=y%3, digit=y)) for x,y in zip(X[:160], Y[:160], strict=True)]
    return DataLoaders.from_dsets(items[:96], items[96:], bs=32, num_workers=0, device='cpu')

@pytest.mark.parametrize('output,target', [('rest',None),('digit','rest')])
def test_targets_by_name(output, target):
    "Of the same key, though in another place"
    def loss(p, y): return F.cross_entropy(p['digit'], y['digit'])
    seen = []
    class Seen(DistillLoss):
        def forward(self, pred, target):
            seen.append(target)
            return 0*pred.sum()
    planned(KD(None, TaskLoss()+Seen(), output=output, target=target), named_targets(), Heads(names=('digit','rest')),
            lambda p,y: loss(p, y).mean())
    assert torch.equal(seen[0].sort().values, seen[0].sort().values.clamp(max=2)) and len(seen[0])==32

@in_float64
def test_a_fit_on_the_second_target():
    teacher = Heads(8, 1)
    def fit(loss_func, *cbs):
        seed(2)
        learn = learner(Heads(), tuples(*map(real, (X[:160],)), Y[:160], Y[:160]%3), loss_func=loss_func, metrics=[])
        learn.dls.n_inp = 1
        seed(3)
        learn.fit(1, cbs=cbs)
        assert left(learn, teacher)==[]
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    a = fit(both, KD(None, TaskLoss()+.5*OnLabels(), output=1))
    b = fit(lambda p,y,z: both(p, y, z)+.5*F.cross_entropy(p[1], z))
    assert (a-b).abs().max()<1e-10

def test_a_target_that_cannot_be_told():
    class Three(Heads):
        def forward(self, x): return *super().forward(x),x
    def learn(): return learner(Three(), two_targets(), loss_func=both, metrics=[])
    says = r'reads the labels: the student returns 3 things.* 2 targets: say which belongs to it with target='
    refuses(learn(), says, KD(None, TaskLoss()+OnLabels(), output=1))
    refuses(learn(), r"target=2: a batch has 2 target\(s\), 0, 1", KD(None, TaskLoss()+OnLabels(), output=1, target=2))
    said = learn()
    said.fit(1, cbs=KD(None, TaskLoss()+OnLabels(), output=1, target=1))
    free = learn()                                                          # no label is read
    free.fit(1, cbs=KD(Frozen(Three(8, 1), output=1), SoftTarget(), output=1))

def test_one_target_is_that_of_every_head():
    "As DeiT's, whose second output learns from the teacher"
    y = torch.zeros(4)
    heads = torch.zeros(4,2),torch.ones(4,2)
    assert belonging(1, heads, (y,)) is None
    assert belonging(None, heads, (y,y)) is None
    assert belonging(1, torch.zeros(2,3), (y,y)) is None                    # no heads

# ---- labels out of range ----

@pytest.mark.parametrize('loss', [OFALogits,OnLabels])
def test_labels_that_are_no_class(loss):
    def clamped(p, y): return F.cross_entropy(p, y.clamp(max=9))
    teacher = net(8, s=1)
    learn = learner(net(), tuples(X[:160], torch.where(Y[:160]>8, 11, Y[:160])), loss_func=clamped, metrics=[])
    says = r'11 is none of the 10 classes that the student returns \(0 to 9\); .* ignore_index=11 leaves it out'
    refuses(learn, says, KD(teacher, TaskLoss()+loss()), teachers=[teacher])
    if loss is OFALogits: learn.fit(1, cbs=KD(teacher, TaskLoss()+loss(), ignore_index=11))

def test_missing_labels_are_no_classes_either():
    y = torch.where(torch.arange(160)%3>0, Y[:160], 255)
    learn = learner(net(), tuples(X[:160], y), loss_func=CrossEntropyLossFlat(), metrics=[],
                    cbs=[KD(net(8, s=1), TaskLoss()+OFALogits()),MissingLabels(missing=255)])
    learn.fit(1)

# ---- labels that are left out ----

class Seg(nn.Module):
    def __init__(self, s=0, classes=3):
        super().__init__()
        seed(s)
        self.c = nn.Conv2d(1, classes, 3, 1, 1)
    def forward(self, x): return self.c(x)

masks = (X[:160,0]>.3).long()+(X[:160,0]>.8).long()
masks[:,:2] = 255
ways = dict(
    module=(nn.CrossEntropyLoss(ignore_index=255),None), fastai=(CrossEntropyLossFlat(axis=1, ignore_index=255),None),
    partial=(partial(F.cross_entropy, ignore_index=255),None),
    nested=(partial(partial(F.cross_entropy, ignore_index=255), label_smoothing=0.),None),
    function=(lambda p,y: F.cross_entropy(p, y, ignore_index=255),255))

@pytest.mark.parametrize('way', ways)
def test_void_pixels(way):
    "Neither taught nor counted, wherever the label for them is said"
    loss,said = ways[way]
    student,teacher = Seg(),loud(Seg(1))
    learn = learner(student, tuples(X[:160], masks), loss_func=loss, metrics=[])
    cb = KD(teacher, SoftTarget(), ignore_index=said)
    learn.fit(1, 0., cbs=cb)
    last = slice(64,96)
    keep = (masks[last]!=255).flatten()
    with torch.no_grad(): s,t = (m(X[last]).movedim(1, -1).reshape(-1, 3)[keep] for m in (student,teacher))
    kl = (t/4).softmax(1)*((t/4).log_softmax(1)-(s/4).log_softmax(1))
    assert cb.parts['soft_target']==pytest.approx(16*kl.sum(1).mean().item(), rel=1e-5)
    assert cb.parts['agreement']==pytest.approx((s.argmax(1)==t.argmax(1)).float().mean().item(), rel=1e-6)
    assert keep.float().mean()==.75

def test_void_that_nobody_told():
    "A number beyond the classes is refused, with the word for it"
    learn = learner(Seg(), tuples(X[:160], masks), loss_func=ways['function'][0], metrics=[])
    refuses(learn, r'255 is none of the 3 classes .* ignore_index=255 leaves it out', KD(Seg(1), SoftTarget()))
    with pytest.raises(TypeError, match="ignore_index='255': expected the label"):
        KD(Seg(1), SoftTarget(), ignore_index='255')
    assert 'ignore_index=255' in repr(KD(Seg(1), SoftTarget(), ignore_index=255))

@pytest.mark.parametrize('kind', [torch.long,torch.float32])
def test_void_pixels_of_yes_or_no(kind):
    "Which no loss function of torch's leaves out: only the callback can say it"
    def bce(p, y):
        keep = y!=255
        return F.binary_cross_entropy_with_logits(p[:,0][keep], y[keep].float())
    student,teacher = Seg(classes=1),loud(Seg(1, 1))
    y = masks.clamp(max=1).where(masks!=255, masks).to(kind)
    learn = learner(student, tuples(X[:160], y), loss_func=bce, metrics=[])
    bce.kind = 'multi'
    cb = KD(teacher, BinarySoftTarget(), ignore_index=255)
    learn.fit(1, 0., cbs=cb)
    keep = masks[64:96]!=255
    with torch.no_grad(): s,t = (m(X[64:96])[:,0][keep] for m in (student,teacher))
    p,q = t.sigmoid(),s.sigmoid()
    want = (p*(p/q).log()+(1-p)*((1-p)/(1-q)).log()).mean()
    assert cb.parts['binary_soft_target']==pytest.approx(want.item(), rel=1e-4)
    assert cb.parts['agreement']==pytest.approx(((s>0)==(t>0)).float().mean().item(), rel=1e-6)

def test_fcfd_leaves_void_out():
    "Its comparison of yes-or-no predictions too"
    z,t = torch.randn(1,1,2,2),torch.randn(1,1,2,2)
    class Bce(nn.BCEWithLogitsLoss): ignore_index = 255
    y = torch.tensor([[[1.,255],[0,255]]])
    loss = FCFD()
    got = loss.compare(z, t, y, Bce())
    want = loss.compare(z[...,:1], t[...,:1], y[...,:1], nn.BCEWithLogitsLoss())
    assert got.item()==pytest.approx(want.item(), rel=1e-6)

def test_weights_in_a_partial():
    "Labels taken one by one have no place that a weight could go by, wherever the weight is said"
    weighed = partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor([1.,2,3]))
    y = torch.rand(160, 3).round()
    y[::3,1] = float('nan')
    learn = learner(net(classes=3), tuples(X[:160], y), loss_func=weighed, metrics=[], cbs=MissingLabels(entries=True))
    with pytest.raises(ValueError, match=r'weighs 3 outputs by their place \(pos_weight\)'): learn.fit(1)

def test_what_partials_say():
    assert ignored_label(partial(len, ignore_index=3))==3
    assert ignored_label(partial(nn.CrossEntropyLoss(ignore_index=4), 1))==4
    assert task_kind(partial(F.mse_loss, reduction='sum'))=='regression'
