"TAS: the assistant against networks called part by part, the loss against loops, and what a Learner makes of it"
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from common import (KD,At,HalfCPU,ViT,X,Y,assert_same,get_dls,in_float64,learner,left,net,raising,refuses,seed,state,
                    tuples)
from fastai.callback.mixup import MixUp
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat,MSELossFlat
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.tas import TAS,right_share
from fasterdistill.missing import MissingLabels
from fasterdistill.networks.net import Net
from fasterdistill.networks.stages import stages

timm = pytest.importorskip('timm')


# -- networks by name: how to make one, its first stages, and its last with the classifier, as `(prediction, feature)`

def timms(name, **kwargs): return partial(timm.create_model, name, num_classes=10, **kwargs)

def _chain(z, *fs):
    for f in fs: z = f(z)
    return z

_cuts = dict(resnet='layer3', vit='blocks.2', swin='layers.2', mixer='blocks.2', convnext='stages.2', net='layer2',
             own='blocks.2')
_make = dict(
    resnet=timms('resnet10t'), convnext=timms('convnext_atto'),
    vit=timms('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=3),
    swin=timms('swin_tiny_patch4_window7_224', img_size=32, patch_size=2, window_size=4, embed_dim=24,
               depths=(1,1,1,1), num_heads=(1,2,2,4)),
    mixer=partial(timm.models.mlp_mixer.MlpMixer, num_classes=10, img_size=32, patch_size=8, num_blocks=4,
                  embed_dim=48),
    net=partial(net, 4, s=1), own=ViT)

def _vit_tokens(m, x): return torch.cat([m.cls_token.expand(len(x), -1, -1), m.patch_embed(x)], 1)+m.pos_embed
_early = dict(
    resnet=lambda m,x: _chain(x, m.conv1, m.bn1, m.act1, m.maxpool, m.layer1, m.layer2, m.layer3),
    convnext=lambda m,x: _chain(x, m.stem, *list(m.stages)[:3]),
    vit=lambda m,x: _chain(_vit_tokens(m, x), *list(m.blocks)[:3]),
    net=lambda m,x: m.layer2(m.layer1(x)))
_feature = dict(                                     # from the cut on
    vit=lambda m,z: m.norm(m.blocks[3](z))[:,0],
    swin=lambda m,z: m.norm(m.layers[3](z)).mean((1,2)),
    mixer=lambda m,z: m.norm(m.blocks[3](z)).mean(1),
    convnext=lambda m,z: m.head.norm(m.stages[3](z).mean((2,3), keepdim=True)).flatten(1),
    net=lambda m,z: m.layer3(z).mean((2,3)),
    own=lambda m,z: m.norm(m.blocks[3](z))[:,0])
_classifier = dict(vit=lambda m: m.head, swin=lambda m: m.head.fc, mixer=lambda m: m.head, convnext=lambda m: m.head.fc,
                   net=lambda m: m.fc, own=lambda m: m.fc)

def late(name, m, z):
    "Prediction and feature"
    f = _feature[name](m, z)
    return _classifier[name](m)(f),f

def picture(student): return (1,8,8) if student in ('net','own') else (3,32,32)
def images(student, n=6):
    seed(9)
    return torch.randn(n, *picture(student))

def lively(m, x):
    "Averages of BatchNorm that are not those of the beginning, a token and a head that are not 0"
    with torch.no_grad():
        m.train()(x)
        for p in m.parameters():
            if p.abs().max()<1e-3: p.normal_(std=.2)

def pair(student, teacher, train=False):
    seed(7)
    s,t = _make[student](),_make[teacher]()
    for m in (s,t): lively(m, torch.randn(16, *picture(student)))
    return s.train(train),t.eval().requires_grad_(False)

def built(tas, s, t, cuts, x, y=None):
    "`tas`, built for two networks cut at `cuts`, and all it reads"
    both = zip((s,t), cuts, ('student','teacher'), strict=True)
    ns,nt = (Net(m, x, [k,'embedding'], who=who) for m,k,who in both)
    vs = ns(x, bn='batch' if s.training else 'eval')
    with torch.no_grad(): vt = nt(x, bn='eval')
    given = dict(fm_s=vs.fm, fm_t=vt.fm, pred=vs.pred, teacher_pred=vt.pred, student=ns, teacher=nt, xb=(x,))
    seed(3)
    with torch.no_grad(): tas.build(**given)
    return given if y is None else dict(given, target=y)

own_cuts = ['layer2','blocks.2']

def net_and_own(n=6, **kwargs):
    "A CNN, a ViT, TAS between them, and what it reads of a batch with labels"
    (s,t),tas = pair('net', 'own'),TAS(**kwargs)
    return s,t,tas,built(tas, s, t, own_cuts, images('net', n), Y[:n].clone())

def assistant(tas, given): return tas.assistant(**{k: given[k] for k in ('fm_s','fm_t','student','teacher','xb')})

# -- 1: the assistant

def close(a, b, tol=1e-10): torch.testing.assert_close(a, b, rtol=0, atol=tol*max(1, b.abs().max().item()))

def gradients(answer, feature, parameters):
    "Of something that every number of both has a part in"
    total = (answer**2).sum()+(feature*torch.linspace(-1, 1, feature.shape[1])).sum()
    return torch.autograd.grad(total, list(parameters.values()), allow_unused=True)

def same_with_gradients(got, want, s, tas, tol=1e-10):
    "Predictions, features, and their gradients in student and projector: `(parameters, gradients, gradients wanted)`"
    for a,b in zip(got, want, strict=True): close(a, b, tol)
    ps = dict(s.named_parameters()) | {f'l2g.{n}': p for n,p in tas.assistant.l2g.named_parameters()}
    ga,gb = gradients(*got, ps),gradients(*want, ps)
    top = max(g.abs().max() for g in gb if g is not None)
    for n,a,b in zip(ps, ga, gb, strict=True):
        assert (a is None)==(b is None), n
        if a is not None: assert (a-b).abs().max()<=tol*max(b.abs().max(), top), n
    return ps,ga,gb

def untouched(t): return not any(p.requires_grad or p.grad is not None for p in t.parameters())

@in_float64
@pytest.mark.parametrize('student,teacher', [
    ('resnet','vit'), ('resnet','swin'), ('convnext','mixer'), ('resnet','convnext'), ('net','own'), ('net','net')])
def test_the_students_stages_then_the_teachers(student, teacher):
    "Prediction, feature and gradients are those of the parts called one after the other"
    s,t = pair(student, teacher)
    x,tas = images(student),TAS()
    given = built(tas, s, t, [_cuts[student],_cuts[teacher]], x)
    got = assistant(tas, given)
    want = late(teacher, t, tas.assistant.l2g(_early[student](s, x)))
    assert not tas.assistant.by_teacher
    assert got[0].shape==(6,10)
    assert got[1].shape==given['fm_t']['embedding'].shape
    assert got[0].std(0).max()>1e-4                                                  # items are told apart
    ps,_,gb = same_with_gradients(got, want, s, tas)
    first = next(n for n,g in zip(ps, gb, strict=True) if g is not None)
    assert first==next(iter(ps))                                                     # the student's first layer
    assert gb[0].abs().max()>0
    assert all(g is not None for n,g in zip(ps, gb, strict=True) if n.startswith('l2g'))
    assert untouched(t)

@in_float64
@pytest.mark.parametrize('student,teacher,first', [
    ('vit','resnet','auto'), ('mixer','convnext','auto'), ('swin','resnet','auto'), ('own','net','auto'),
    ('convnext','resnet','teacher')])
def test_the_teachers_stages_then_the_students(student, teacher, first):
    s,t = pair(student, teacher)
    x,tas = images(student),TAS(first=first)
    given = built(tas, s, t, [_cuts[student],_cuts[teacher]], x)
    got = assistant(tas, given)
    with torch.no_grad(): z = _early[teacher](t, x)
    want = late(student, s, tas.assistant.l2g(z))
    assert tas.assistant.by_teacher
    assert got[1].shape==given['fm_s']['embedding'].shape
    assert got[0].std(0).max()>1e-4
    ps,ga,_ = same_with_gradients(got, want, s, tas)
    learns = {n for n,g in zip(ps, ga, strict=True) if g is not None and g.abs().max()>0}
    assert any(n.startswith(('head','fc')) for n in learns)
    assert next(iter(s.named_parameters()))[0] not in learns                         # the late stages alone
    assert untouched(t)

@in_float64
def test_a_training_students_tail_normalises_by_the_batch():
    "As its own pass does; no average moves"
    s,t = pair('net', 'net', train=True)
    x,tas = images('net'),TAS(first='teacher')
    given,was = built(tas, s, t, ['layer2']*2, x),state(s)
    p,f = assistant(tas, given)
    conv,bn,_ = s.layer3
    z = conv(tas.assistant.l2g(t.layer2(t.layer1(x))))
    z = F.relu(F.batch_norm(z, None, None, bn.weight, bn.bias, training=True)).mean((2,3))
    close(f, z)
    close(p, s.fc(z))
    assert_same(state(s), was)

@in_float64
def test_without_a_tail():
    "A linear classifier on the mean of what the projector makes, class token left out"
    s,_,tas,given = net_and_own(tail=False, attention=False)
    p,f = assistant(tas, given)
    x, = given['xb']
    z = tas.assistant.l2g.embed(s.layer2(s.layer1(x))).mean((2,3))
    assert tas.assistant.l2g.attention is None
    close(f, z)
    close(p, z@tas.assistant.classifier.weight.T+tas.assistant.classifier.bias)
    g = torch.autograd.grad(p.square().sum(), [s.layer1[0].weight,tas.assistant.l2g.embed[0].weight])
    assert all(o.abs().max()>0 for o in g)                             # the answer alone teaches projector and student

def test_the_late_stages_learn_nothing_of_the_teachers_pass():
    "The assistant's answer depends on the student's map alone, so its class token is not the teacher's"
    *_,tas,given = net_and_own()
    other = dict(given, fm_t={k: torch.randn_like(v) for k,v in given['fm_t'].items()})
    assert torch.equal(assistant(tas, given)[0], assistant(tas, other)[0])

# -- 2: the loss, item by item

def by_answers(p, goal, y, gamma, T):
    res = 0.
    for a,g,c in zip((p/T).softmax(1).log(), (goal/T).softmax(1), y.tolist(), strict=True):
        for k in range(len(a)): res = res-((g[k]+1)**gamma-1 if k==c else g[k]**gamma)*a[k]
    return res/len(p)

def by_features(f, goal, tau):
    def cosine(a, b): return (a*b).sum()/(a.norm()*b.norm())
    cos = torch.stack([torch.stack([cosine(a, b) for b in goal]) for a in f])/tau
    return sum(cos[i].exp().sum().log()-cos[i,i] for i in range(len(f)))/len(f)

_compared = [dict(ofa=True, infonce=True),dict(ofa=True, infonce=False),dict(ofa=False, infonce=True)]
_switches = [dict(o, teach_assistant=a, tail=t, attention=m)
             for o,a,t,m in product(_compared, (True,False), (True,False), (True,False))]

def feature_of(m, x): return m.feature(x) if isinstance(m, ViT) else _feature['net'](m, _early['net'](m, x))

def assistants_answer(tas, s, t, x):
    "Prediction and feature, of the parts called one after the other"
    first,second = (t,s) if isinstance(s, ViT) else (s,t)
    z = tas.assistant.l2g(_early['net'](first, x))
    if tas.tail: return late('own', second, z)
    return tas.assistant.classifier(z[:,1:].mean(1)),z[:,1:].mean(1)

def by_parts(tas, s, t, x, y, gamma, T, tau, ofa, infonce, teach_assistant, **_):
    "What the callback computes on a batch, from the networks' parts and loops; the assistant's prediction"
    p_a,f_a = assistants_answer(tas, s, t, x)
    f_s,f_t = feature_of(s, x),feature_of(t, x)
    p_s,p_t = s.fc(f_s),t.fc(f_t)
    kind = 'student' if isinstance(s, ViT) else 'teacher'          # of the assistant's feature
    if not tas.tail: kind = 'assistant'
    pairs = [(p_s,f_s,p_t,f_t,'student_teacher'), (p_s,f_s,p_a,f_a,f'student_{kind}')]
    if teach_assistant: pairs.append((p_a,f_a,p_t,f_t,f'{kind}_teacher'))
    total = 0.
    for p,f,p_goal,f_goal,way in pairs:
        if way in tas.meet: f = f@tas.meet[way].weight.T+tas.meet[way].bias
        if ofa: total = total+by_answers(p, p_goal, y, gamma, T)
        if infonce: total = total+by_features(f, f_goal, tau)
    return total.item(),p_a

@in_float64
@pytest.mark.parametrize('student,teacher', [('net','own'), ('own','net')])
@pytest.mark.parametrize('switches', _switches, ids=lambda o: '-'.join(k for k,v in o.items() if v))
def test_the_whole_loss(student, teacher, switches):
    "What the callback computes on one batch, at a learning rate of 0, from the networks' parts and loops"
    s,t = pair(student, teacher, train=True)
    numbers,batches = dict(gamma=1.3, T=2., tau=.2),[]
    tas = TAS(**numbers, **switches)
    def keep(l):
        if l.training: batches.append((l.x.detach().as_subclass(torch.Tensor),l.y))
    cb = KD(t, TaskLoss()+tas)
    learner(s, get_dls(n=12, bs=12, shuffle=False), cbs=[cb,At('before_batch', keep)]).fit(1, 0.)
    (x,y), = batches
    want,p_a = by_parts(tas, s.train(), t.eval(), x, y, **numbers, **switches)
    assert abs(cb.parts['tas']-want)<1e-9*want
    assert abs(cb.parts['assistant_acc']-(p_a.argmax(1)==y).double().mean().item())<1e-6
    assert ('tas_tau' in cb.parts)==switches['infonce']

@pytest.mark.parametrize('who,whom,student,projector', [
    ('student','assistant',True,False), ('assistant','teacher',False,True)], ids=['student','assistant'])
def test_who_learns_from_whom(who, whom, student, projector):
    "The assistant from the teacher, and the student from the assistant, whom the student's errors do not move"
    s,t,tas,given = net_and_own()
    tas.pairs = [(who,whom)]
    tas(**given).backward()
    def moved(m): return any(p.grad is not None and p.grad.abs().max()>0 for p in m.parameters())
    assert s.layer1[0].weight.grad.abs().max()>0
    assert moved(s.fc)==student
    assert moved(tas.assistant.l2g)==projector
    assert not moved(t)

# -- 3: who comes first

@pytest.mark.parametrize('student,teacher,who', [
    ('resnet','vit','student'), ('vit','resnet','teacher'), ('resnet','swin','student'), ('swin','resnet','teacher'),
    ('convnext','mixer','student'), ('mixer','convnext','teacher'), ('resnet','convnext','student'),
    ('convnext','resnet','student'), ('vit','swin','student'), ('swin','vit','student'), ('mixer','vit','student'),
    ('vit','vit','student')])
def test_order(student, teacher, who):
    "The CNN; of two networks of a kind, or of attention and MLP, the student; `first` says it otherwise"
    s,t = pair(student, teacher)
    x = images(student, 2)
    cuts = [stages(m, x)[-2].name for m in (s,t)]
    assert cuts==[_cuts[student],_cuts[teacher]]
    for first,want in (('auto',who), ('student','student'), ('teacher','teacher')):
        tas = TAS(first=first)
        built(tas, s, t, cuts, x)
        assert tas.assistant.by_teacher==(want=='teacher')
        assert tas.assistant.cut==(cuts[0] if want=='teacher' else cuts[1])

def test_first_is_one_of_three():
    with pytest.raises(ValueError, match="first='cnn'.*'auto', 'student' or 'teacher'"): TAS(first='cnn')

_papers = [                                          # teacher, student, and where the student and the teacher are cut
    ('swin_tiny_patch4_window7_224','resnet18','layer3','layers.2'),
    ('vit_small_patch16_224','resnet18','layer3','blocks.8'),
    ('vit_small_patch16_224','mobilenetv2_100','blocks.4','blocks.8'),
    ('convnext_tiny','deit_tiny_patch16_224','blocks.8','stages.2'),
    ('convnext_tiny','resmlp_12_224','blocks.8','stages.2'),
    ('resnet50','swin_tiny_patch4_window7_224','layers.2','layer3')]

@pytest.mark.slow
@pytest.mark.parametrize('teacher,student,cut_s,cut_t', _papers, ids=lambda o: o.split('_')[0])
def test_pairs_of_the_paper(teacher, student, cut_s, cut_t):
    "At their own size of 224 pixels layers are found and cut without being named"
    cb = KD(timms(teacher)(), TaskLoss()+TAS())
    data = tuples([*torch.randn(2, 3, 224, 224)]*2, [0,1]*2, n=2, valid=2, bs=2)
    plan = cb.plan(learner(timms(student)(), data, loss_func=nn.CrossEntropyLoss(), cbs=cb, metrics=[]))
    cut,feature = plan.rows[1].layers
    assert cut.startswith(cut_s)
    assert f'→ {cut_t} ' in cut
    assert feature.startswith('embedding')
    assert plan.rows[1].value>0

# -- 4: BatchNorm

@pytest.mark.parametrize('first', ['student','teacher'])
def test_averages_move_once_a_step(first):
    "The student's are to the last bit those of a fit without TAS, the teacher's do not move"
    def buffers(*cbs):
        s = net(4, s=1)
        learner(s, get_dls(n=160), cbs=list(cbs)).fit(1, 0.)
        return {n: b.clone() for n,b in s.named_buffers()}
    t = net(6, s=2)
    was = state(t)
    alone,beside = buffers(),buffers(KD(t, TaskLoss()+TAS(first=first)))
    assert_same(state(t), was)
    assert_same(alone, beside)
    assert all(v==5 for n,v in alone.items() if 'num_batches' in n)

# -- 5: what is learned, and what is left

_embed,_block,_tau = 8*16+16 + 16,12*16**2+13*16,1   # from 8 to 16 channels and the token; the block; the temperature

@pytest.mark.parametrize('kwargs,count', [
    ({}, _embed+_block+_tau), (dict(attention=False), _embed+_tau), (dict(infonce=False), _embed+_block),
    (dict(tail=False), _embed+_block+16*10+10+_tau), (dict(teach_assistant=False), _tau),
    (dict(teach_assistant=False, tail=False), _tau)])
def test_plan_counts(kwargs, count):
    """The patch embedding, the token, the block, the classifier, the temperature;
    features are 16 wide both, so that no layer goes between"""
    s,t = net(4, s=1),ViT(16)
    cb = KD(t, TaskLoss()+TAS(**kwargs))
    was = state(s),state(t)
    plan = cb.plan(learner(s, cbs=cb))
    assert plan.learned==count
    assert_same(state(s), was[0])
    assert_same(state(t), was[1])
    assert plan.rows[1].layers==[
        'layer2 (8, 4, 4) → blocks.2 (17, 16)', 'embedding (fc:in) (16) → embedding (fc:in) (16)']

def n_meet(tas): return sum(p.numel() for p in tas.meet.parameters())

@pytest.mark.parametrize('d,count', [(16,0), (24,16*24+24)])
def test_one_layer_between_two_widths(d, count):
    """Of features: none where they are equal; the same one for the student from the teacher and from the assistant,
    whose feature is the teacher's kind"""
    ways = ['student_teacher'][:count]
    s,_ = pair('net', 'own')
    vit,tas = ViT(d).eval(),TAS()
    built(tas, s, vit.requires_grad_(False), own_cuts, images('net'))
    assert n_meet(tas)==count
    assert [*tas.meet]==ways

    tas = TAS()
    built(tas, vit.requires_grad_(True), net(4, s=1).eval().requires_grad_(False), own_cuts[::-1], images('net'))
    assert tas.assistant.by_teacher
    assert n_meet(tas)==(count and 24*16+16)
    assert [*tas.meet]==ways

@pytest.mark.parametrize('student,teacher', [('net','own'), ('own','net')])
def test_nothing_is_left(student, teacher, tmp_path):
    s,t,tas = _make[student](),_make[teacher](),TAS()
    keys,was = list(s.state_dict()),state(t)
    learn = learner(s, cbs=KD(t, TaskLoss()+tas))
    learn.fit(1)
    before = {n: p.clone() for n,p in tas.named_parameters()}
    learn.fit(1)
    assert not left(learn, t)
    assert list(s.state_dict())==keys
    assert_same(state(t), was)
    for n,p in tas.named_parameters():                                 # all of the projector, in the second fit too
        if p.requires_grad and p.ndim!=1: assert not torch.equal(p, before[n]), n
    xs,_ = learn.dls.valid.one_batch()
    want = learn.model.eval()(xs)
    learn.export(tmp_path/'x.pkl')
    assert torch.equal(load_learner(tmp_path/'x.pkl').model.eval()(xs), want)

def test_nothing_is_left_of_a_broken_fit():
    t = ViT()
    stop = At('after_backward', raising(RuntimeError('here')), skip=1)
    learn = learner(net(4, s=1), cbs=[KD(t, TaskLoss()+TAS()),stop])
    with pytest.raises(RuntimeError, match='here'): learn.fit(1)
    assert not left(learn, t)

@pytest.mark.parametrize('teach', [True,False])
def test_an_assistant_that_is_not_taught_is_not_in_the_optimizer(teach):
    tas,seen = TAS(teach_assistant=teach, tail=False),[]
    def note(l): seen.append({id(p) for g in l.opt.param_lists for p in g})
    learner(net(4, s=1), cbs=[KD(ViT(), TaskLoss()+tas),At('before_step', note)]).fit(1)
    mine = {id(p) for m in (tas.assistant.l2g,tas.assistant.classifier) for p in m.parameters()}
    assert seen
    for ids in seen:
        assert bool(mine & ids)==teach
        assert (mine<=ids)==teach

# -- 6: other ways of training

def test_mixup_is_linear_in_the_labels():
    seed(4)
    p,q,_ = torch.randn(3, 6, 10)
    f,tas,y,other,lam = torch.randn(6, 8),TAS(gamma=1.7),Y[:6],Y[3:9],torch.rand(6)
    assert 0<(lam>=.5).sum()<6
    assert (y!=other).all()
    tas.infonce = False
    def one(i, y): return tas.compare(p[i:i+1], f, q[i:i+1], f, y[i:i+1])
    want = sum(lam[i]*one(i, y)+(1-lam[i])*one(i, other) for i in range(6))/6
    torch.testing.assert_close(tas.compare(p, f, q, f, y, mix=(other,lam)), want, rtol=1e-5, atol=0)

    hot,hot_other = F.one_hot(y, 10).float(),F.one_hot(other, 10).float()
    larger = F.one_hot(torch.where(lam>=.5, y, other), 10).float()     # the larger part counts
    assert right_share(larger, y, (other,lam)).item()==1.
    assert right_share(hot_other, y, (other,torch.tensor(.3))).item()==1.
    assert right_share(hot_other, hot, (hot_other,.3)).item()==1.

def test_under_mixup():
    cb = KD(ViT(), TaskLoss()+TAS())
    learn = learner(net(), cbs=[cb,MixUp()])
    learn.fit(2)
    last = cb.history[-1]
    assert all(abs(v)<1e3 for v in last.values() if v is not None)
    assert 0<=last['assistant_acc']<=1
    assert not left(learn, cb.teacher.model)

plain_dls = partial(tuples, n=48, valid=16, bs=16)

@in_float64
def test_soft_labels_that_are_hard():
    "Shares of 0 and 1 are the labels"
    def history(y):
        cb = KD(ViT(), TaskLoss()+TAS(gamma=1.4))
        seed(2)
        learner(net(s=1), plain_dls(X.double(), y), loss_func=nn.CrossEntropyLoss(), cbs=cb, metrics=[]).fit(1, 0.)
        return cb.history[-1]
    hard,soft = history(Y),history(torch.eye(10)[Y])
    for k in ('tas','task_loss','assistant_acc','tas_tau'): assert abs(hard[k]-soft[k])<1e-6

class Spy(TAS):
    "Notes the kinds of number that the loss is computed from"
    def loss(self, *args):
        self.seen = {o.dtype for o in args[:6]}
        return super().loss(*args)

def test_under_autocast():
    for student,teacher in (('net','own'), ('own','net')):
        t,spy,inner = _make[teacher](),Spy(),set()
        h = t.fc.register_forward_hook(lambda m,a,out: inner.add(out.dtype))
        cb = KD(t, TaskLoss()+spy)
        learner(_make[student](), cbs=[cb,HalfCPU()]).fit(2)
        h.remove()
        assert torch.bfloat16 in inner
        assert spy.seen=={torch.float32}
        assert all(v==v and abs(v)<1e3 for v in cb.history[-1].values())

def test_items_without_a_label_are_neither_right_nor_wrong():
    *_,tas,given = net_and_own()
    y,gone = given['target'],[0,3,4]
    p,_ = assistant(tas, given)
    y[gone] = -100
    y[1] = p[1].argmax()                                                   # one right, and
    y[[2,5]] = (p[[2,5]].argmax(1)+1)%10                                   # two wrong
    tas(**given)
    assert tas.take_logged()['assistant_acc']==pytest.approx(1/3)
    tas(**dict(given, target=torch.full((6,), -100)))
    assert tas.take_logged()['assistant_acc']==0

    soft = torch.eye(10)[y.clamp(min=0)]
    soft[gone] = float('nan')
    assert right_share(p, soft).item()==pytest.approx(1/3)
    assert right_share(p, y, criterion=nn.CrossEntropyLoss(ignore_index=int(y[1]))).item()==0.

def test_with_missing_labels():
    "The second batch has none at all"
    y = Y.clone()
    y[torch.arange(len(y))%3>0] = -100
    y[16:32] = -100
    cb = KD(ViT(), TaskLoss()+TAS())
    learner(net(s=1), plain_dls(X, y), loss_func=nn.CrossEntropyLoss(), cbs=[cb,MissingLabels()]).fit(1, 0.)
    assert all(v==v for v in cb.history[-1].values())
    n,m = [(y[i:i+16]>=0).sum().item() for i in (0,32)]
    means = [(a/n+b/m)/2 for a in range(n+1) for b in range(m+1)]          # of two batches, not of three
    assert any(abs(cb.history[-1]['assistant_acc']-o)<1e-6 for o in means)

class Dense(nn.Module):
    "A class for each pixel"
    def __init__(self):
        super().__init__()
        self.layer1,self.layer2 = nn.Conv2d(1, 4, 3, 1, 1),nn.Conv2d(4, 8, 3, 2, 1)
        self.layer3,self.fc = nn.Conv2d(8, 8, 3, 2, 1),nn.Conv2d(8, 10, 1)
    def forward(self, x):
        z = self.layer3(self.layer2(self.layer1(x)).relu()).relu()
        return F.interpolate(self.fc(z), x.shape[2:])

def of_tas(t, **kwargs): return KD(t, TaskLoss()+TAS(**kwargs))

@pytest.mark.parametrize('loss_func,label,n,match', [
    (MSELossFlat, lambda y: y[:,None].float(), 1, 'needs one class of several an item; .* regression'),
    (BCEWithLogitsLossFlat, lambda y: torch.eye(10)[y], 10, 'yes-or-no outputs'),
    (nn.CrossEntropyLoss, lambda y: y*0, 1, r'the student predicts \(16, 1\)')], ids=['regression','multi','one'])
def test_refused_tasks(loss_func, label, n, match):
    s,t = net(classes=n, s=1),net(classes=n, s=2)
    learn = learner(s, plain_dls(X, label(Y)), loss_func=loss_func(), metrics=[])
    refuses(learn, match, of_tas(t), teachers=[t])
    assert not left(learn, t)

def test_dense_is_refused():
    learn = learner(Dense(), plain_dls(X, (X[:,0]>.5).long()), loss_func=nn.CrossEntropyLoss(), metrics=[])
    refuses(learn, r'one class of several an item; the student predicts \(16, 10, 8, 8\)', of_tas(Dense()))

def test_unequal_classes_are_refused():
    refuses(learner(net(s=1)), 'the same classes are expected', of_tas(net(classes=7, s=2), ofa=False))

class Around(nn.Module):
    "The classifier also reads an early map"
    def __init__(self):
        super().__init__()
        seed(6)
        self.layer1,self.layer2 = nn.Conv2d(1, 4, 3, 1, 1),nn.Conv2d(4, 8, 3, 2, 1)
        self.layer3,self.fc = nn.Conv2d(8, 8, 3, 2, 1),nn.Linear(12, 10)
    def forward(self, x):
        a = self.layer1(x)
        late = self.layer3(self.layer2(a.relu()).relu()).mean((2,3))
        return self.fc(torch.cat([late, a.mean((2,3))], 1))

def trains(student, cb):
    "A fit of it has a value to show"
    learner(student, cbs=cb).fit(1)
    assert cb.history[-1]['tas']>0

def test_says_why_a_network_cannot_be_cut():
    refuses(learner(net(s=1)), r"the teacher \(Around\) cannot be cut at 'layer2'.*TAS\(tail=False\)", of_tas(Around()))
    refuses(learner(Around()), r"the student \(Around\) cannot be cut at 'layer2'", of_tas(net(), first='teacher'))
    trains(net(s=1), of_tas(Around(), tail=False))
    trains(Around(), of_tas(net()))                                        # what comes first need not be cut

class Flat(nn.Module):
    "One layer with a map"
    def __init__(self):
        super().__init__()
        self.layer1,self.fc = nn.Conv2d(1, 4, 3, 2, 1),nn.Linear(4, 10)
    def forward(self, x): return self.fc(self.layer1(x).relu().mean((2,3)))

@pytest.mark.parametrize('student,teacher', [(net,Flat), (Flat,net), (Flat,Flat)])
def test_a_network_of_one_stage(student, teacher):
    refuses(learner(student()), r"TAS\(\).*'stages\[-2\]'", of_tas(teacher()))
    if student is net:                                                     # named, it does: the tail is the classifier
        named = TAS().at(['layer2','embedding'], ['layer1','embedding'])
        trains(student(), KD(teacher(), TaskLoss()+named))

@pytest.mark.parametrize('layers,match', [
    (['layer2'], 'reads two layers of each network'), (['layer1','layer2','embedding'], 'here are 3'),
    (['embedding','layer2'], 'no projector between'),
    (['layer3','layer2'], "'layer2' of the teacher does not come after 'layer3'")])
def test_other_layers(layers, match):
    refuses(learner(net(s=1)), match, KD(net(s=2), TaskLoss()+TAS().at(layers)))

def test_a_batch_of_one_goes_without():
    cb,seen = of_tas(ViT()),[]
    def note(l):
        if l.training: seen.append((len(l.x),'tas' in cb.parts))
    data = get_dls(n=33, drop_last=False, shuffle=False)
    learner(net(bn=False), data, cbs=[cb,At('after_loss', note)]).fit(1)
    assert seen==[(32,True),(1,False)]
    assert cb.history[-1]['tas']>0

# -- 7: the temperature

def test_temperature_is_learned():
    tas,names = TAS(tau=.1),[]
    cb = KD(ViT(), TaskLoss()+tas)
    note = At('after_epoch', lambda l: names.append(list(l.recorder.metric_names)))
    learner(net(s=1), cbs=[cb,note]).fit(3)
    taus = [h['tas_tau'] for h in cb.history]
    assert {'assistant_acc','tas_tau'}<=set(names[0])
    assert abs(taus[0]-.1)<.03
    assert len(set(taus))==3
    assert tas.features.log_tau.exp().item()!=pytest.approx(.1, abs=1e-4)

def test_temperature_has_a_floor():
    *_,tas,given = net_and_own()
    with torch.no_grad(): tas.features.log_tau.fill_(-9.)
    assert tas(**given).isfinite()
    assert tas.take_logged()['tas_tau']==pytest.approx(.01)
