"CRD: the numbers of the authors' code over three steps, and its memory in real fits"
from pathlib import Path

import numpy as np
import pytest
import torch
from common import KD,assert_same,get_dls,learner,left,refuses,seed,state,unlabelled
from fastai.callback.mixup import CutMix,MixUp

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.crd import CRD,Bank,draw_others

dtypes = pytest.mark.parametrize('dtype', [torch.float64,torch.float32], ids=['64','32'])

def vectors():
    with np.load(Path(__file__).parent/'vectors'/'crd.npz') as d: return dict(d)

def loaded(v, dtype):
    "A loss with the layers and the memory of the file"
    s,t = torch.tensor(v['in_fs'][0]),torch.tensor(v['in_ft'][0])
    loss = CRD(width=8, tau=float(v['par_tau']), momentum=float(v['par_momentum']))
    loss.build(fm_s={'a':s}, fm_t={'a':t}, n_items=int(v['par_n_items']))
    loss.to(dtype)
    with torch.no_grad():
        for name,side in (('s',loss.of_student),('t',loss.of_teacher)):
            for k,p in side[0][1].named_parameters(): p.copy_(torch.tensor(v[f'par_embed_{name}_{k}']))
            getattr(loss.banks[0], name).copy_(torch.tensor(v[f'par_memory_{name}']))
    return loss

@dtypes
@pytest.mark.parametrize('train', [True,False], ids=['train','eval'])
def test_vectors(dtype, train):
    "Values and gradients of three steps, memory and constants going on; in evaluation nothing does"
    v = vectors()
    loss = loaded(v, dtype).train(train)
    bank,was = loss.banks[0],state(loss)
    value_tol,grad_tol = ((1e-9,1e-6) if dtype is torch.float64 else (2e-5,1e-4))
    for i in range(3 if train else 1):
        s,t = (torch.tensor(v[k][i], dtype=dtype) for k in ('in_fs','in_ft'))
        s.requires_grad_()
        a,b = (torch.nn.functional.normalize(side[0](z)) for side,z in ((loss.of_student,s),(loss.of_teacher,t)))
        value = loss.loss(a, b, torch.tensor(v['in_at'][i]), bank)
        bank.keep(torch.tensor(v['in_idx'][i]), a.detach(), b.detach(), bank.classes)
        np.testing.assert_allclose(value.item(), v['out_crd'][i], rtol=value_tol)
        wanted = dict(fs=s, **{f'embed_{n}_{k}': p for n,side in (('s',loss.of_student),('t',loss.of_teacher))
                               for k,p in side[0][1].named_parameters()})
        grads = torch.autograd.grad(value, [*wanted.values()])
        for k,g in zip(wanted, grads, strict=True):
            want = v[f'grad_{k}'][i]
            np.testing.assert_allclose(g.double().numpy(), want, rtol=0, atol=grad_tol*np.abs(want).max())
    if not train: return assert_same(state(loss), was)
    for name in ('s','t'):
        np.testing.assert_allclose(getattr(bank, name).numpy(), v[f'out_memory_{name}'], rtol=0, atol=value_tol)
    np.testing.assert_allclose(bank.log_z.exp().numpy(), v['out_z'], rtol=10*value_tol)

def whole(fm_s, fm_t, n, width, **given):
    "The value, and the gradient of the student's features, of a loss whose first memory depends on `n` and `width`"
    seed(0)
    loss = CRD(negatives=5, width=width)
    loss.build(fm_s={'a':fm_s}, fm_t={'a':fm_t}, n_items=n)
    s = fm_s.clone().requires_grad_()
    value = loss(fm_s={'a':s}, fm_t={'a':fm_t}, **given)
    return loss,value,torch.autograd.grad(value, s)[0]

@pytest.mark.parametrize('n,width', [(60,4),(10,4)], ids=['few of many','the whole memory'])
def test_both_ways_of_comparing(n, width):
    "Drawn rows alone, or the product with all of them: by loops, with the very draws of the loss"
    s,t,idx = torch.randn(4, 6),torch.randn(4, 3),torch.tensor([1,7,4,9])
    loss,value,g = whole(s, t, n, width, idx=idx)
    fresh,draws = Bank(n, width, (gen := torch.Generator().manual_seed(0))),gen
    at = torch.cat([idx[:,None],draw_others(torch.full((n,), -1), idx, 5, draws)], 1)
    s = s.requires_grad_()
    a,b = (torch.nn.functional.normalize(side[0](z)) for side,z in ((loss.of_student,s),(loss.of_teacher,t)))
    total = 0.
    for z,memory in ((a,fresh.t),(b,fresh.s)):
        e = torch.stack([torch.stack([(z[i]@memory[j]/.07).exp() for j in at[i]]) for i in range(4)])
        p = e/(e.detach().mean()*n)
        total = total - (p[:,0]/(p[:,0]+5/n)).log().mean() - (5/n/(p[:,1:]+5/n)).log().sum(1).mean()
    torch.testing.assert_close(value, total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(g, torch.autograd.grad(total, s)[0], rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('scale', [0.,1e-20,1e4])
def test_extremes(scale):
    "Features of nothing, and large ones, at a temperature that exponentials of float32 would not bear"
    s,t,idx = scale*torch.randn(4, 6),torch.randn(4, 3),torch.tensor([1,7,4,9])
    loss = CRD(negatives=5, width=4, tau=.005)
    loss.build(fm_s={'a':s}, fm_t={'a':t}, n_items=20)
    for _ in range(3):
        a = s.clone().requires_grad_()
        value = loss(fm_s={'a':a}, fm_t={'a':t}, idx=idx)
        grads = torch.autograd.grad(value, [a,*loss.parameters()])
        assert value.isfinite()
        assert all(g.isfinite().all() for g in grads)
    assert all(o.isfinite().all() for o in loss.state_dict().values())

# ---- in a Learner ----

def kd(teacher, **kwargs): return KD(teacher, TaskLoss()+.8*CRD(width=16, **kwargs))

def test_remembers_whom_it_saw(teacher):
    "Every item's class, at its own place; features of length 1; nothing is left behind"
    cb = kd(teacher)
    learn = learner(dls=get_dls(drop_last=False), cbs=cb)
    learn.fit(1)
    bank,labels = cb.loss.losses[1].banks[0],[int(y) for _,y in learn.dls.train_ds]
    assert bank.classes.tolist()==labels
    for z in (bank.s,bank.t): torch.testing.assert_close(z.norm(dim=1), torch.ones(96))
    assert bank.known
    assert left(learn, teacher)==[]

def test_draws_nothing_from_the_global_generator(teacher):
    cb,seen = kd(teacher),[]
    for more in ([cb],[]):
        learn = learner(dls=get_dls(), cbs=more)
        seed(5)
        learn.fit(1)
        seen.append(torch.get_rng_state())
    assert torch.equal(*seen)

def test_plan_and_lr_find_leave_the_memory(teacher):
    cb = kd(teacher)
    learn = learner(cbs=cb)
    learn.fit(1)
    was,draws = state(cb.loss),cb.loss.losses[1].draws.get_state()
    cb.plan()
    assert_same(state(cb.loss), was)
    learn.lr_find(num_it=4, show_plot=False)
    assert_same(state(cb.loss), was)
    assert torch.equal(cb.loss.losses[1].draws.get_state(), draws)

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixes_are_refused(teacher, mix):
    refuses(learner(), 'under MixUp and CutMix a picture is of two', kd(teacher), mix(), teachers=(teacher,))

def test_another_training_set_is_refused(teacher):
    cb = kd(teacher)
    learn = learner(cbs=cb)
    learn.fit(1)
    learn.dls = get_dls(n=64)
    refuses(learn, 'a memory of 96 items, and this training set has 64', teachers=(teacher,))

def test_too_many_negatives_are_refused(teacher):
    refuses(learner(), 'has 96 items, so that there are 95 others', kd(teacher, negatives=96), teachers=(teacher,))
    learner(cbs=kd(teacher, negatives=95)).fit(1)

@pytest.mark.parametrize('bad,why', [(dict(tau=0), 'tau=0'), (dict(momentum=1), 'momentum=1'),
                                     (dict(negatives=0), 'negatives=0')])
def test_refused_arguments(bad, why):
    with pytest.raises(ValueError, match=why): CRD(**bad)

def test_told_from_other_classes(teacher):
    "As soon as classes are known, none of those drawn is of the item's own"
    cb,same = kd(teacher, negatives=40),[]
    learn = learner(cbs=cb)
    learn.fit(1)
    loss = cb.loss.losses[1]
    compare = loss.loss
    def watching(s, t, at, bank):
        classes = bank.classes[at]
        same.append(int((classes[:,:1]==classes[:,1:]).sum()))
        return compare(s, t, at, bank)
    loss.loss = watching
    learn.fit(1)
    assert same[1:]==[0]*3                                           # the first is the trial, whose places are made up

@pytest.mark.parametrize('labels,by_class', [(True,False),(False,True)])
def test_without_labels(teacher, labels, by_class):
    "Not asked for, or not there: any other item will do"
    cb = KD(teacher, CRD(width=16, by_class=by_class), weight=1.)
    learner(dls=get_dls() if labels else unlabelled(), cbs=cb).fit(1)
    bank = cb.loss.banks[0]
    assert (bank.classes==-1).all()
    assert bank.known

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda(teacher):
    "The memory lies on the device; the draws are those of the CPU, and so are the values"
    s,t,idx = torch.randn(4, 6),torch.randn(4, 3),torch.tensor([1,7,4,9])
    loss,value,g = whole(s, t, 60, 4, idx=idx)
    again,on_gpu,_ = whole(s.cuda(), t.cuda(), 60, 4, idx=idx.cuda())
    assert {o.device.type for o in again.state_dict().values()}=={'cuda'}
    assert again.banks[0].s.shape==loss.banks[0].s.shape
    assert torch.equal(again.draws.get_state(), loss.draws.get_state())
    torch.testing.assert_close(on_gpu.cpu(), value, rtol=1e-3, atol=1e-3)
