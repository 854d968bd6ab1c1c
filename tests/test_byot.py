"BYOT in Learners: who learns from whom, the three modules that are made of it, many kinds of networks"
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import CutMix,MixUp
from torch import nn

from common import KD,X,Y,StepLosses,exports,get_dls,hooked,learner,left,net,seed,state,tuples
from fasterdistill.loss import TaskLoss
from fasterdistill.losses import BYOT,DeepSupervision
from fasterdistill.losses.byot import exits_table
from test_zoo import build

def fitted(loss=None, n=1, dls=None, model=None, cbs=()):
    "A loss and a Learner that has trained with it"
    loss = loss or BYOT()
    learn = learner(model or net(), dls or get_dls(shuffle=False), cbs=[KD(None, TaskLoss()+loss),*cbs])
    learn.fit(n, .05)
    assert left(learn)==[]
    return loss,learn

def by_hand(loss, model, x):
    "Logits of all exits and of the network, and their features"
    z = [model.layer1(x)]
    z.append(model.layer2(z[0]))
    goal = model.layer3(z[1]).mean((2,3))
    feats = [h.neck(o) for h,o in zip(loss.heads, z, strict=True)]
    preds = [h.fc(f) for h,f in zip(loss.heads, feats, strict=True)]+[model.fc(goal)]
    for i,a in enumerate(loss.adapters): feats[i] = a(feats[i])
    return preds,[*feats,goal]

@pytest.mark.parametrize('form', ['paper','journal','port'])
def test_a_step_equals_its_formula(form):
    "In training: the loss of the second batch by autograd through layers called by hand"
    loss = BYOT(form=form)
    _,learn = fitted(loss)
    model,x,y = learn.model.train(),X[:16],Y[:16]
    loss.train()
    preds,feats = by_hand(loss, model, x)
    fm = dict(layer1=model.layer1(x), layer2=model.layer2(model.layer1(x)), embedding=feats[-1])
    got = loss(fm_s=fm, pred=preds[-1], target=y)
    alpha = .1 if form=='port' else .3
    labels = sum(F.cross_entropy(p, y) for p in preds[:-1])
    told = sum(F.kl_div(F.log_softmax(p/3, 1), F.softmax(preds[-1]/3, 1), reduction='batchmean') for p in preds[:-1])
    entropy = -(F.softmax(preds[-1]/3, 1)*F.log_softmax(preds[-1]/3, 1)).sum(1).mean()
    if form!='paper': told = told+2*entropy
    if form=='port': told = 9*told
    d = [f-feats[-1] for f in feats[:-1]]
    hints = dict(paper=.03*sum((o**2).sum()/16 for o in d), journal=.03*(d[0]**2).sum().sqrt(),
                 port=1e-6*sum((o**2)[(f>0)|(feats[-1]>0)].sum() for o,f in zip(d, feats)))[form]
    torch.testing.assert_close(got, (1-alpha)*labels+alpha*told+hints, rtol=1e-5, atol=1e-6)

# parameters of the student and of the exits that move, parameter by parameter
early = {'layer1.0','layer1.1','layer2.0','layer2.1'}

@pytest.mark.parametrize('kwargs', [dict(), dict(alpha=0), dict(alpha=1, features=0), dict(alpha=1, features=1),
                                    dict(adapt=True), dict(form='journal'), dict(form='port')])
def test_who_learns(kwargs):
    "Of the student what lies before an exit, nothing behind the last; of the exits all"
    loss,learn = fitted(BYOT(**kwargs))
    model,x,y = learn.model.train(),X[:16],Y[:16]
    learn.opt.zero_grad()
    loss.zero_grad()
    z1 = model.layer1(x)
    z2 = model.layer2(z1)
    goal = model.layer3(z2).mean((2,3))
    loss(fm_s=dict(layer1=z1, layer2=z2, embedding=goal), pred=model.fc(goal), target=y).backward()
    moved = {n for n,p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()>0}
    assert {n.rsplit('.', 1)[0] for n in moved}==early
    for n,p in loss.named_parameters(): assert p.grad is not None and p.grad.abs().sum()>0, n

def test_deep_supervision_is_the_labels_alone():
    loss,learn = fitted(DeepSupervision())
    model,x,y = learn.model.eval(),X[:16],Y[:16]
    loss.eval()
    preds,feats = by_hand(loss, model, x)
    fm = dict(layer1=model.layer1(x), layer2=model.layer2(model.layer1(x)), embedding=feats[-1])
    want = sum(F.cross_entropy(p, y) for p in preds[:-1])
    torch.testing.assert_close(loss(fm_s=fm, pred=preds[-1], target=y), want)
    assert repr(loss)=='DeepSupervision()'

def test_at_keeps_the_embedding_and_columns_are_those_of_the_exits():
    loss = BYOT().at(['layer2'])
    kd = KD(None, TaskLoss()+loss)
    learn = learner(dls=get_dls(), cbs=kd)
    learn.fit(1)
    assert kd.loss.losses[1].places==['layer2']
    assert {'byot_labels','byot_answers','byot_features','exit1_acc'}<=kd.history[0].keys()
    assert 'exit2_acc' not in kd.history[0]
    assert 0<=kd.history[0]['exit1_acc']<=1

@pytest.mark.parametrize('mixer', [MixUp,CutMix])
def test_mixed(mixer):
    "Both labels count, each as much as is in it"
    steps = StepLosses()
    loss,learn = fitted(cbs=[mixer(.4),steps])
    assert all(map(lambda v: v==v, steps.vals))
    loss.eval()
    preds,feats = [torch.randn(4, 10) for _ in range(3)],[torch.randn(4, 6) for _ in range(3)]
    a,b,lam = torch.tensor([0,1,2,3]),torch.tensor([4,5,6,7]),torch.tensor([1.,.5,.25,0.])
    got = DeepSupervision().loss(preds, feats, a, (b,lam))
    want = sum((lam*F.cross_entropy(p, a, reduction='none')+(1-lam)*F.cross_entropy(p, b, reduction='none')).mean()
               for p in preds[:2])
    torch.testing.assert_close(got, want)

# ---- what is made of it ----

def test_exit_stops_there():
    loss,learn = fitted()
    model,before = learn.model.eval(),state(learn.model)
    loss.eval()
    with torch.no_grad(): preds,_ = by_hand(loss, model, X[:8])
    for k in (1,2):
        module = loss.exit(model, k)
        with torch.no_grad(): torch.testing.assert_close(module(X[:8]), preds[k-1])
        names = {n.removeprefix('model.').split('.')[0] for n,_ in module.body.named_parameters()}
        assert names=={f'layer{i}' for i in range(1, k+1)}
        again = pickle.loads(pickle.dumps(module))
        with torch.no_grad(): assert torch.equal(again(X[:8]), module(X[:8]))
        if not exports: continue
        program = torch.export.export(module, (X[:8],), dynamic_shapes=({0: torch.export.Dim('n', min=2)},))
        with torch.no_grad(): torch.testing.assert_close(program.module()(X[:5]), preds[k-1][:5])
    assert state(model).keys()==before.keys()
    assert list(hooked(model))==[]
    for k in (0,3):
        with pytest.raises(ValueError, match='there are exits 1 to 2'): loss.exit(model, k)

def test_ensemble():
    loss,learn = fitted()
    model,loss = learn.model.eval(),loss.eval()
    with torch.no_grad():
        preds,_ = by_hand(loss, model, X[:8])
        module = loss.ensemble(model)
        torch.testing.assert_close(module(X[:8]), sum(preds)/3)
        torch.testing.assert_close(copy.deepcopy(module)(X[:5]), sum(preds)[:5]/3)
    assert list(hooked(model))==[]

@pytest.mark.parametrize('share', [0.,.3,1.])
def test_early_exit_passes_on_what_is_not_sure(share):
    "Items that each layer computes are counted"
    loss,learn = fitted(n=3)
    model,loss = learn.model.eval(),loss.eval()
    x = X[:40]
    with torch.no_grad(): preds,_ = by_hand(loss, model, x)
    sure = [p.softmax(1).amax(1) for p in preds]
    thr = [s.quantile(1-share).item() if 0<share<1 else 2.-2*share for s in sure[:2]]
    module,counts = loss.early_exit(model, thr),dict(layer1=0, layer2=0, layer3=0, fc=0)
    for name in counts:
        def hook(m, args, name=name): counts[name] += len(args[0])
        layer = module.model.get_submodule(name)
        (layer[0] if name!='fc' else layer).register_forward_pre_hook(hook)
    with torch.no_grad(): got = module(x)
    first = sure[0]>=thr[0]
    second = ~first & (sure[1]>=thr[1])
    want = torch.where(first[:,None], preds[0], torch.where(second[:,None], preds[1], preds[2]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert module.left.tolist()==torch.where(first, 0, torch.where(second, 1, 2)).tolist()
    on,last = int((~first).sum()),int((~first & ~second).sum())
    assert counts==dict(layer1=40, layer2=on, layer3=last, fc=last)
    assert list(hooked(model))==[]

def test_table():
    loss,learn = fitted()
    table = exits_table(loss, learn.model, X[:32], Y[:32], thresholds=(0.,2.), repeats=1)
    assert list(table.index)==['exit 1','exit 2','network','ensemble','early, 0','early, 2']
    cost,right = table['MFLOPs an item'],table['accuracy']
    assert cost['exit 1']<cost['exit 2']<cost['ensemble']
    assert cost['early, 0']==pytest.approx(cost['exit 1'])
    assert cost['early, 2']==pytest.approx(cost['ensemble'])
    assert (right['early, 0'],right['early, 2'])==(right['exit 1'],right['network'])
    conv = 8*8*9*4+4*4*9*4*8+2*2*9*8*16+16*10                            # of the network, by its shapes
    assert cost['network']==pytest.approx(2*conv/1e6)

def test_before_a_fit():
    for make in (lambda: BYOT().exit(net(), 1), lambda: BYOT().ensemble(net()), lambda: BYOT().early_exit(net())):
        with pytest.raises(RuntimeError, match=r'BYOT\(\) has no exits yet: they are made in a fit'): make()

class Jumps(nn.Module):
    "The end also reads what came first"
    def __init__(self):
        super().__init__()
        seed(0)
        self.layer1,self.layer2,self.fc = nn.Conv2d(1, 4, 3, 2, 1),nn.Conv2d(4, 8, 3, 2, 1),nn.Linear(12, 10)
    def forward(self, x):
        a = self.layer1(x)
        return self.fc(torch.cat([a.mean((2,3)),self.layer2(a).mean((2,3))], 1))

def test_no_way_on():
    loss,learn = fitted(BYOT().at('layer2'), model=Jumps())
    loss = learn.knowledge_distillation.loss.losses[1]
    loss.exit(learn.model, 1)
    with pytest.raises(ValueError, match="it cannot go on from an exit: .* cannot be cut at 'layer2'"):
        loss.early_exit(learn.model)

# ---- networks ----

quick = [('torchvision','resnet18',{}), ('timm','vit_tiny_patch16_224',dict(img_size=64))]
more = [('timm','resnet10t',{}), ('timm','convnext_atto',{}), ('fastai','resnet18',{}), ('fastai','convnext_atto',{}),
        ('torchvision','mobilenet_v2',{}), ('timm','deit_tiny_distilled_patch16_224',dict(img_size=64))]
cases = [pytest.param(*o, size, id=f'{o[0]}-{o[1]}-{size}', marks=[pytest.mark.slow]*(o not in quick or size==96))
         for o in quick+more for size in (64,96)]

@pytest.mark.parametrize('kind,name,kw,size', cases)
def test_networks(kind, name, kw, size):
    "Two sizes each: exits are made, learn, and answer alone, together and early as in one pass"
    model,x,_ = build(kind, name, size, {k: size for k in kw})
    x = torch.randn(8, 3, size, size)
    loss = BYOT()
    _,learn = fitted(loss, dls=tuples(x, Y[:8], n=4, valid=4, bs=4), model=model)
    assert len(loss.heads)==len(loss.places)>=2
    model,loss = learn.model.eval(),loss.eval()
    with torch.no_grad():
        both = loss.ensemble(model)
        answers = both.answers(x)
        torch.testing.assert_close(answers[-1], model(x))
        torch.testing.assert_close(both(x), sum(answers)/len(answers))
        for k in (1,len(loss.heads)):
            module = loss.exit(model, k)
            torch.testing.assert_close(module(x), answers[k-1])
            assert sum(p.numel() for p in module.body.parameters())<sum(p.numel() for p in model.parameters())
        early = loss.early_exit(model, 2.)
        torch.testing.assert_close(early(x), model(x), rtol=1e-3, atol=1e-4)
