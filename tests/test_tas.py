"TAS: the assistant against networks called part by part, the loss against loops, and what a Learner makes of it"
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from common import KD,At,X,Y,assert_same,get_dls,learner,left,net,seed,state
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat,MSELossFlat
from test_fcfd import BF16
from torch import nn

from fasterdistill.networks.stages import stages
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.tas import TAS,right_share
from fasterdistill.missing import MissingLabels
from fasterdistill.networks.net import Net

timm = pytest.importorskip('timm')
torch.set_num_threads(1)

class ViT(nn.Module):
    "Pictures of 8×8 cut into 4×4 patches, a class token, four blocks, of torch's own modules"
    def __init__(self, d=16, s=5):
        super().__init__(); seed(s)
        self.patch,self.cls,self.pos = nn.Conv2d(1, d, 2, 2),nn.Parameter(torch.randn(1,1,d)),nn.Parameter(torch.randn(1,17,d))
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(d, 2, 2*d, 0., batch_first=True, norm_first=True) for _ in range(4)])
        self.norm,self.fc = nn.LayerNorm(d),nn.Linear(d, 10)
    def forward(self, x):
        z = self.patch(x).flatten(2).transpose(1,2)
        return self.fc(self.norm(self.blocks(torch.cat([self.cls.expand(len(z),-1,-1), z], 1)+self.pos))[:,0])

# -- networks by name: how to make one, its first stages, and its last with the classifier, as `(prediction, feature)`

def _chain(z, *fs):
    for f in fs: z = f(z)
    return z
_cuts = dict(resnet='layer3', vit='blocks.2', swin='layers.2', mixer='blocks.2', convnext='stages.2', net='layer2', own='blocks.2')
_make = dict(
    resnet=lambda: timm.create_model('resnet10t', num_classes=10), convnext=lambda: timm.create_model('convnext_atto', num_classes=10),
    vit=lambda: timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=3, num_classes=10),
    swin=lambda: timm.create_model('swin_tiny_patch4_window7_224', img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(1,1,1,1), num_heads=(1,2,2,4), num_classes=10),
    mixer=lambda: timm.models.mlp_mixer.MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=4, embed_dim=48), net=lambda: net(4, s=1), own=ViT)
_early = dict(
    resnet=lambda m,x: _chain(x, m.conv1, m.bn1, m.act1, m.maxpool, m.layer1, m.layer2, m.layer3), convnext=lambda m,x: _chain(x, m.stem, *list(m.stages)[:3]),
    vit=lambda m,x: _chain(torch.cat([m.cls_token.expand(len(x),-1,-1), m.patch_embed(x)], 1)+m.pos_embed, *list(m.blocks)[:3]), net=lambda m,x: m.layer2(m.layer1(x)))
_late = dict(
    vit=lambda m,z: (lambda f: (m.head(f),f))(m.norm(m.blocks[3](z))[:,0]),
    swin=lambda m,z: (lambda f: (m.head.fc(f),f))(m.norm(m.layers[3](z)).mean((1,2))),
    mixer=lambda m,z: (lambda f: (m.head(f),f))(m.norm(m.blocks[3](z)).mean(1)),
    convnext=lambda m,z: (lambda f: (m.head.fc(f),f))(m.head.norm(m.stages[3](z).mean((2,3), keepdim=True)).flatten(1)),
    net=lambda m,z: (lambda f: (m.fc(f),f))(m.layer3(z).mean((2,3))),
    own=lambda m,z: (lambda f: (m.fc(f),f))(m.norm(m.blocks[3](z))[:,0]))

def pair(student, teacher, train=False):
    seed(7); s,t = _make[student](),_make[teacher]()
    with torch.no_grad():
        for m in (s,t):                                  # averages of BatchNorm that are not those of the beginning, a token and a head that are not 0
            m.train()(torch.randn(16, *((1,8,8) if student in ('net','own') else (3,32,32))))
            for p in m.parameters():
                if p.abs().max()<1e-3: p.normal_(std=.2)
    return s.train(train),t.eval().requires_grad_(False)

def built(tas, s, t, cuts, x, y=None):
    "`tas`, built for two networks cut at `cuts`, and all it reads"
    ns,nt = (Net(m, x, [k,'embedding'], who=who) for m,k,who in zip((s,t), cuts, ('student','teacher'), strict=True))
    vs = ns(x, bn='batch' if s.training else 'eval')
    with torch.no_grad(): vt = nt(x, bn='eval')
    given = dict(fm_s=vs.fm, fm_t=vt.fm, pred=vs.pred, teacher_pred=vt.pred, student=ns, teacher=nt, xb=(x,))
    seed(3)
    with torch.no_grad(): tas.build(**given)
    return given if y is None else dict(given, target=y)

def images(student, n=6): seed(9); return torch.randn(n, *((1,8,8) if student in ('net','own') else (3,32,32)))
def assistant(tas, given): return tas.assistant(**{k: given[k] for k in ('fm_s','fm_t','student','teacher','xb')})

# -- 1: the assistant

def same_with_gradients(got, want, s, tas):
    "Predictions, features, and their gradients in the student and the projector, to 1e-5; `(parameters, gradients, gradients wanted)`"
    for a,b in zip(got, want, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-5*max(1, b.abs().max().item()))
    ps = dict(s.named_parameters()) | {f'l2g.{n}': p for n,p in tas.assistant.l2g.named_parameters()}
    ga,gb = (torch.autograd.grad((p**2).sum()+(f*torch.linspace(-1, 1, f.shape[1])).sum(), list(ps.values()), allow_unused=True) for p,f in (got,want))
    top = max(g.abs().max() for g in gb if g is not None)
    for n,a,b in zip(ps, ga, gb, strict=True):
        assert (a is None)==(b is None), n
        if a is not None: assert (a-b).abs().max()<=1e-5*max(b.abs().max(), top), n
    return ps,ga,gb

@pytest.mark.parametrize('student,teacher', [('resnet','vit'),('resnet','swin'),('convnext','mixer'),('resnet','convnext'),('net','own'),('net','net')])
def test_the_students_stages_then_the_teachers(student, teacher):
    "Prediction, feature and gradients are those of the parts called one after the other"
    s,t = pair(student, teacher)
    x,tas = images(student),TAS()
    given = built(tas, s, t, [_cuts[student],_cuts[teacher]], x)
    assert not tas.assistant.by_teacher
    got = assistant(tas, given)
    want = _late[teacher](t, tas.assistant.l2g(_early[student](s, x)))
    assert got[0].shape==(6,10) and got[1].shape==given['fm_t']['embedding'].shape and got[0].std(0).max()>1e-4       # items are told apart
    ps,ga,gb = same_with_gradients(got, want, s, tas)
    first = next(n for n,g in zip(ps, gb, strict=True) if g is not None)
    assert first==next(iter(ps)) and gb[0].abs().max()>0                             # the student's first layer
    assert all(g is not None for n,g in zip(ps, gb, strict=True) if n.startswith('l2g'))
    assert not any(p.requires_grad or p.grad is not None for p in t.parameters())

@pytest.mark.parametrize('student,teacher,first', [('vit','resnet','auto'),('mixer','convnext','auto'),('swin','resnet','auto'),('own','net','auto'),('convnext','resnet','teacher')])
def test_the_teachers_stages_then_the_students(student, teacher, first):
    s,t = pair(student, teacher)
    x,tas = images(student),TAS(first=first)
    given = built(tas, s, t, [_cuts[student],_cuts[teacher]], x)
    assert tas.assistant.by_teacher
    got = assistant(tas, given)
    with torch.no_grad(): z = _early[teacher](t, x)
    want = _late[student](s, tas.assistant.l2g(z))
    assert got[1].shape==given['fm_s']['embedding'].shape and got[0].std(0).max()>1e-4
    ps,ga,gb = same_with_gradients(got, want, s, tas)
    learns = {n for n,g in zip(ps, ga, strict=True) if g is not None and g.abs().max()>0}
    assert any(n.startswith(('head','fc')) for n in learns) and next(iter(s.named_parameters()))[0] not in learns     # the late stages alone
    assert not any(p.requires_grad or p.grad is not None for p in t.parameters())

def test_a_training_students_tail_normalises_by_the_batch():
    "As its own pass does; no average moves"
    s,t = pair('net', 'net', train=True)
    x,tas = images('net'),TAS(first='teacher')
    given,was = built(tas, s, t, ['layer2']*2, x),state(s)
    p,f = assistant(tas, given)
    conv,bn,_ = s.layer3
    z = F.relu(F.batch_norm(conv(tas.assistant.l2g(t.layer2(t.layer1(x)))), None, None, bn.weight, bn.bias, training=True)).mean((2,3))
    torch.testing.assert_close(f, z, rtol=0, atol=1e-5); torch.testing.assert_close(p, s.fc(z), rtol=0, atol=1e-5)
    assert_same(state(s), was)

def test_without_a_tail():
    "A linear classifier on the mean of what the projector makes, class token left out"
    s,t = pair('net', 'own')
    x,tas = images('net'),TAS(tail=False, attention=False)
    given = built(tas, s, t, ['layer2','blocks.2'], x)
    p,f = assistant(tas, given)
    assert tas.assistant.l2g.attention is None
    z = tas.assistant.l2g.embed(s.layer2(s.layer1(x))).mean((2,3))
    torch.testing.assert_close(f, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(p, z@tas.assistant.classifier.weight.T+tas.assistant.classifier.bias, rtol=0, atol=1e-5)
    g = torch.autograd.grad(p.square().sum(), [s.layer1[0].weight,tas.assistant.l2g.embed[0].weight])         # the answer alone teaches projector and student
    assert all(o.abs().max()>0 for o in g)

def test_the_late_stages_learn_nothing_of_the_teachers_pass():
    "The assistant's answer depends on the student's map alone, so its class token is not the teacher's"
    s,t = pair('net', 'own')
    x,tas = images('net'),TAS()
    given = built(tas, s, t, ['layer2','blocks.2'], x)
    p,_ = assistant(tas, given)
    q,_ = assistant(tas, dict(given, fm_t={k: torch.randn_like(v) for k,v in given['fm_t'].items()}))
    assert torch.equal(p, q)

# -- 2: the loss, item by item

def by_answers(p, goal, y, gamma, T):
    res = 0.
    for a,g,c in zip((p/T).softmax(1).log(), (goal/T).softmax(1), y.tolist(), strict=True):
        res = res-sum(((g[k]+1)**gamma-1 if k==c else g[k]**gamma)*a[k] for k in range(len(a)))
    return res/len(p)
def by_features(f, goal, tau):
    cos = torch.stack([torch.stack([(a*b).sum()/(a.norm()*b.norm()) for b in goal]) for a in f])/tau
    return sum(cos[i].exp().sum().log()-cos[i,i] for i in range(len(f)))/len(f)

_switches = [dict(ofa=o, infonce=i, teach_assistant=a, tail=t, attention=m) for (o,i),a,t,m in product([(True,True),(True,False),(False,True)], [True,False], [True,False], [True,False])]

@pytest.mark.parametrize('student,teacher', [('net','own'),('own','net')])
@pytest.mark.parametrize('switches', _switches, ids=lambda o: '-'.join(k for k,v in o.items() if v))
def test_the_whole_loss(student, teacher, switches):
    "What the callback computes on one batch, at a learning rate of 0, from the networks' parts and loops"
    s,t = pair(student, teacher, train=True)
    tas,seen = TAS(gamma=1.3, T=2., tau=.2, **switches),[]
    cb = KD(t, TaskLoss()+tas); learn = learner(s, get_dls(n=12, bs=12, shuffle=False), cbs=[cb,At('before_batch', lambda l: seen.append((l.x.detach().as_subclass(torch.Tensor),l.y)) if l.training else None)])
    learn.fit(1, 0.)
    (x,y),s,t = seen[0],s.train(),t.eval()
    first,second = (t,s) if student=='own' else (s,t)
    z = tas.assistant.l2g(first.layer2(first.layer1(x)))
    if switches['tail']: p_a,f_a = _late['own'](second, z)
    else: f_a = z[:,1:].mean(1); p_a = tas.assistant.classifier(f_a)
    feature = lambda m: m.norm(m.blocks(torch.cat([m.cls.expand(len(x),-1,-1), m.patch(x).flatten(2).transpose(1,2)], 1)+m.pos))[:,0] if isinstance(m, ViT) else m.layer3(m.layer2(m.layer1(x))).mean((2,3))
    f_s,f_t = feature(s),feature(t)
    p_s,p_t = s.fc(f_s),t.fc(f_t)
    meet = lambda f, way: f@tas.meet[way].weight.T+tas.meet[way].bias if way in tas.meet else f
    way_a = 'assistant' if not switches['tail'] else 'teacher' if student=='net' else 'student'
    pairs = [(p_s,f_s,p_t,f_t,'student_teacher'),*[(p_a,f_a,p_t,f_t,f'{way_a}_teacher')]*switches['teach_assistant'],(p_s,f_s,p_a,f_a,f'student_{way_a}')]
    want = sum(switches['ofa']*by_answers(p, g, y, 1.3, 2.)+(by_features(meet(f, way), fg, .2) if switches['infonce'] else 0) for p,f,g,fg,way in pairs)
    assert abs(cb.parts['tas']-want.item())<1e-4*want.item()
    assert abs(cb.parts['assistant_acc']-(p_a.argmax(1)==y).float().mean().item())<1e-6
    assert ('tas_tau' in cb.parts)==switches['infonce']

@pytest.mark.parametrize('who,student,projector', [('student',True,False),('assistant',False,True)])
def test_who_learns_from_whom(who, student, projector):
    "The assistant from the teacher, and the student from the assistant, whom the student's errors do not move"
    s,t = pair('net', 'own')
    tas = TAS(); given = built(tas, s, t, ['layer2','blocks.2'], images('net'), Y[:6])
    tas.pairs = [(who,dict(student='assistant', assistant='teacher')[who])]
    tas(**given).backward()
    moved = lambda m: [p.grad is not None and p.grad.abs().max().item()>0 for p in m.parameters()]
    assert s.layer1[0].weight.grad.abs().max()>0
    assert any(moved(s.fc))==student and any(moved(tas.assistant.l2g))==projector and not any(moved(t))

# -- 3: who comes first

@pytest.mark.parametrize('student,teacher,who', [('resnet','vit','student'),('vit','resnet','teacher'),('resnet','swin','student'),('swin','resnet','teacher'),('convnext','mixer','student'),('mixer','convnext','teacher'),
                                                 ('resnet','convnext','student'),('convnext','resnet','student'),('vit','swin','student'),('swin','vit','student'),('mixer','vit','student'),('vit','vit','student')])
def test_order(student, teacher, who):
    "The CNN; of two networks of a kind, or of attention and MLP, the student; `first` says it otherwise"
    s,t = pair(student, teacher)
    x = images(student, 2)
    cuts = [stages(m, x)[-2].name for m in (s,t)]
    assert cuts==[_cuts[student],_cuts[teacher]]
    for first,want in (('auto',who),('student','student'),('teacher','teacher')):
        tas = TAS(first=first); built(tas, s, t, cuts, x)
        assert tas.assistant.by_teacher==(want=='teacher') and tas.assistant.cut==(cuts[0] if want=='teacher' else cuts[1])
def test_first_is_one_of_three():
    with pytest.raises(ValueError, match="first='cnn'.*'auto', 'student' or 'teacher'"): TAS(first='cnn')

_papers = [('swin_tiny_patch4_window7_224','resnet18','layer3','layers.2'),('vit_small_patch16_224','resnet18','layer3','blocks.8'),('vit_small_patch16_224','mobilenetv2_100','blocks.4','blocks.8'),
           ('convnext_tiny','deit_tiny_patch16_224','blocks.8','stages.2'),('convnext_tiny','resmlp_12_224','blocks.8','stages.2'),('resnet50','swin_tiny_patch4_window7_224','layers.2','layer3')]
@pytest.mark.slow
@pytest.mark.parametrize('teacher,student,cut_s,cut_t', _papers, ids=lambda o: o.split('_')[0])
def test_pairs_of_the_paper(teacher, student, cut_s, cut_t):
    "At their own size of 224 pixels layers are found and cut without being named"
    t,s = (timm.create_model(m, num_classes=10) for m in (teacher,student))
    x,y = torch.randn(2,3,224,224),torch.arange(2)
    cb = KD(t, TaskLoss()+TAS())
    dls = DataLoaders.from_dsets(list(zip(x,y)), list(zip(x,y)), bs=2, device='cpu', num_workers=0)
    plan = cb.plan(learner(s, dls, loss_func=nn.CrossEntropyLoss(), cbs=cb, metrics=[]))
    cut,feature = plan.rows[1]['layers']
    assert cut.startswith(cut_s) and f'→ {cut_t} ' in cut and feature.startswith('embedding') and plan.rows[1]['value']>0

# -- 4: BatchNorm

@pytest.mark.parametrize('first', ['student','teacher'])
def test_averages_move_once_a_step(first):
    "The student's are to the last bit those of a fit without TAS, the teacher's do not move"
    res = []
    for loss in (None,TAS(first=first)):
        s,t = net(4, s=1),net(6, s=2)
        was = state(t)
        learn = learner(s, get_dls(n=160))
        if loss is not None: learn.add_cb(KD(t, TaskLoss()+loss))
        learn.fit(1, 0.); assert_same(state(t), was)
        res.append({n: b.clone() for n,b in s.named_buffers()})
    assert_same(*res)
    assert all(v==5 for n,v in res[0].items() if 'num_batches' in n)

# -- 5: what is learned, and what is left

def learned(tas): return sum(p.numel() for p in tas.parameters() if p.requires_grad)

@pytest.mark.parametrize('kwargs,count', [({}, 8*16+16 + 16 + 12*16**2+13*16 + 1), (dict(attention=False), 8*16+16 + 16 + 1), (dict(infonce=False), 8*16+16 + 16 + 12*16**2+13*16),
                                          (dict(tail=False), 8*16+16 + 16 + 12*16**2+13*16 + 16*10+10 + 1), (dict(teach_assistant=False), 1), (dict(teach_assistant=False, tail=False), 1)])
def test_plan_counts(kwargs, count):
    "The patch embedding from 8 to 16 channels, the token, the block, the classifier, the temperature; features are 16 wide both, so that no layer goes between"
    s,t = net(4, s=1),ViT(16)
    cb = KD(t, TaskLoss()+TAS(**kwargs)); learn = learner(s, cbs=cb)
    was = state(s),state(t)
    plan = cb.plan(learn)
    assert plan.learned==count
    assert_same(state(s), was[0]); assert_same(state(t), was[1])
    assert plan.rows[1]['layers']==['layer2 (8, 4, 4) → blocks.2 (17, 16)','embedding (fc:in) (16) → embedding (fc:in) (16)']

@pytest.mark.parametrize('d,count', [(16,0),(24,16*24+24)])
def test_one_layer_between_two_widths(d, count):
    "Of features: none where they are equal; the same one for the student from the teacher and from the assistant, whose feature is the teacher's kind"
    s,t = pair('net', 'own')
    t = ViT(d).eval().requires_grad_(False)
    tas = TAS(); built(tas, s, t, ['layer2','blocks.2'], images('net'))
    assert sum(p.numel() for p in tas.meet.parameters())==count and [*tas.meet]==['student_teacher'][:count]
    tas = TAS(); built(tas, t.requires_grad_(True), net(4, s=1).eval().requires_grad_(False), ['blocks.2','layer2'], images('net'))
    assert tas.assistant.by_teacher and sum(p.numel() for p in tas.meet.parameters())==(count and 24*16+16) and [*tas.meet]==['student_teacher'][:count]

@pytest.mark.parametrize('student,teacher', [('net','own'),('own','net')])
def test_nothing_is_left(student, teacher, tmp_path):
    s,t = _make[student](),_make[teacher]()
    keys,was = list(s.state_dict()),state(t)
    tas = TAS(); cb = KD(t, TaskLoss()+tas); learn = learner(s, cbs=cb)
    learn.fit(1); before = {n: p.clone() for n,p in tas.named_parameters()}
    learn.fit(1)
    assert not left(learn, t) and list(s.state_dict())==keys
    assert_same(state(t), was)
    assert all(not torch.equal(p, before[n]) for n,p in tas.named_parameters() if p.requires_grad and p.ndim!=1), 'all parts of the projector learn, in the second fit too'
    xs,_ = learn.dls.valid.one_batch()
    want = learn.model.eval()(xs)
    learn.export(tmp_path/'x.pkl')
    assert torch.equal(load_learner(tmp_path/'x.pkl').model.eval()(xs), want)

def test_nothing_is_left_of_a_broken_fit():
    def stop(l): raise RuntimeError('here')
    s,t = net(4, s=1),ViT()
    learn = learner(s, cbs=[KD(t, TaskLoss()+TAS()),At('after_backward', stop, skip=1)])
    with pytest.raises(RuntimeError, match='here'): learn.fit(1)
    assert not left(learn, t)

@pytest.mark.parametrize('teach', [True,False])
def test_an_assistant_that_is_not_taught_is_not_in_the_optimizer(teach):
    s,t = net(4, s=1),ViT()
    tas,seen = TAS(teach_assistant=teach, tail=False),[]
    learn = learner(s, cbs=[KD(t, TaskLoss()+tas),At('before_step', lambda l: seen.append({id(p) for g in l.opt.param_lists for p in g}))])
    learn.fit(1)
    mine = {id(p) for m in (tas.assistant.l2g,tas.assistant.classifier) for p in m.parameters()}
    assert all(bool(mine & ids)==teach and (mine<=ids)==teach for ids in seen) and seen

# -- 6: other ways of training

def test_mixup_is_linear_in_the_labels():
    seed(4); p,q,a,f = *torch.randn(3,6,10).unbind(),torch.randn(6,8)
    tas,y,other,lam = TAS(gamma=1.7),Y[:6],Y[3:9],torch.rand(6)
    assert 0<(lam>=.5).sum()<6 and (y!=other).all()
    one = lambda i, y: tas.compare(p[i:i+1], f, q[i:i+1], f, y[i:i+1])
    tas.infonce = False
    want = sum(lam[i]*one(i, y)+(1-lam[i])*one(i, other) for i in range(6))/6
    torch.testing.assert_close(tas.compare(p, f, q, f, y, mix=(other,lam)), want, rtol=1e-5, atol=0)
    assert right_share(F.one_hot(torch.where(lam>=.5, y, other), 10).float(), y, (other,lam)).item()==1.     # the larger part counts
    assert right_share(F.one_hot(other, 10).float(), y, (other,torch.tensor(.3))).item()==1.
    assert right_share(F.one_hot(other, 10).float(), torch.eye(10)[y], (torch.eye(10)[other],.3)).item()==1.
def test_under_mixup():
    cb = KD(ViT(), TaskLoss()+TAS()); learn = learner(net(), cbs=[cb,MixUp()])
    learn.fit(2)
    assert all(abs(v)<1e3 for v in cb.history[-1].values() if v is not None) and 0<=cb.history[-1]['assistant_acc']<=1 and not left(learn, cb.teacher.model)

def plain_dls(y, n=48, bs=16): return DataLoaders.from_dsets(list(zip(X[:n], y[:n])), list(zip(X[n:n+16], y[n:n+16])), bs=bs, val_bs=16, shuffle=False, device='cpu', num_workers=0)
def test_soft_labels_that_are_hard():
    "Shares of 0 and 1 are the labels"
    res = []
    for y in (Y,torch.eye(10)[Y]):
        cb = KD(ViT(), TaskLoss()+TAS(gamma=1.4)); seed(2)
        learn = learner(net(s=1), plain_dls(y), loss_func=nn.CrossEntropyLoss(), cbs=cb, metrics=[]); learn.fit(1, 0.); res.append(cb.history[-1])
    assert all(abs(res[0][k]-res[1][k])<1e-5 for k in ('tas','task_loss','assistant_acc','tas_tau'))

def test_under_autocast():
    seen = []
    class Spy(TAS):
        def loss(self, *args):
            seen.extend(o.dtype for o in args[:6])
            return super().loss(*args)
    def half(m, args, out): inner.add(out.dtype)
    for student,teacher in (('net','own'),('own','net')):
        s,t,inner = _make[student](),_make[teacher](),set()
        h = t.fc.register_forward_hook(half)
        cb = KD(t, TaskLoss()+Spy()); learner(s, cbs=[cb,BF16()]).fit(2); h.remove()
        assert torch.bfloat16 in inner and set(seen)=={torch.float32}
        assert all(v==v and abs(v)<1e3 for v in cb.history[-1].values())

def test_items_without_a_label_are_neither_right_nor_wrong():
    s,t = pair('net', 'own')
    y = Y[:6].clone(); y[[0,3,4]] = -100
    tas = TAS(); given = built(tas, s, t, ['layer2','blocks.2'], images('net'), y)
    p,_ = assistant(tas, given)
    given['target'][1] = p[1].argmax()                                     # one right, and
    given['target'][[2,5]] = (p[[2,5]].argmax(1)+1)%10                     # two wrong
    tas(**given); assert tas.take_logged()['assistant_acc']==pytest.approx(1/3)
    tas(**dict(given, target=torch.full((6,), -100))); assert tas.take_logged()['assistant_acc']==0
    soft = torch.eye(10)[given['target'].clamp(min=0)]; soft[[0,3,4]] = float('nan')
    assert right_share(p, soft).item()==pytest.approx(1/3)
    assert right_share(p, given['target'], criterion=nn.CrossEntropyLoss(ignore_index=int(given['target'][1]))).item()==0.

def test_with_missing_labels():
    "The second batch has none at all"
    y = Y.clone(); y[torch.arange(len(y))%3>0] = -100; y[16:32] = -100
    cb = KD(ViT(), TaskLoss()+TAS()); learn = learner(net(s=1), plain_dls(y), loss_func=nn.CrossEntropyLoss(), cbs=[cb,MissingLabels()])
    learn.fit(1, 0.)
    assert all(v==v for v in cb.history[-1].values())
    n = [sum(y[i:i+16]>=0).item() for i in (0,32)]
    assert any(abs(cb.history[-1]['assistant_acc']-(a/n[0]+b/n[1])/2)<1e-6 for a in range(n[0]+1) for b in range(n[1]+1))     # a mean of two batches, not of three

class Dense(nn.Module):
    "A class for each pixel"
    def __init__(self): super().__init__(); self.layer1,self.layer2,self.layer3,self.fc = nn.Conv2d(1,4,3,1,1),nn.Conv2d(4,8,3,2,1),nn.Conv2d(8,8,3,2,1),nn.Conv2d(8,10,1)
    def forward(self, x): return F.interpolate(self.fc(self.layer3(self.layer2(self.layer1(x)).relu()).relu()), x.shape[2:])
_tasks = dict(regression=(MSELossFlat, lambda y: y[:,None].float(), 1), multi=(BCEWithLogitsLossFlat, lambda y: torch.eye(10)[y], 10), one=(nn.CrossEntropyLoss, lambda y: y*0, 1))
@pytest.mark.parametrize('task,match', [('regression','needs one class of several an item; .* regression'),('multi','yes-or-no outputs'),('one',r'the student predicts \(16, 1\)')])
def test_refused_tasks(task, match):
    f,label,n = _tasks[task]
    s,t = net(classes=n, s=1),net(classes=n, s=2)
    was = state(s)
    learn = learner(s, plain_dls(label(Y)), loss_func=f(), cbs=KD(t, TaskLoss()+TAS()), metrics=[])
    with pytest.raises(ValueError, match=match): learn.fit(1)
    assert_same(state(s), was); assert not left(learn, t)
def test_dense_is_refused():
    y = (X[:,0]>.5).long()
    learn = learner(Dense(), plain_dls(y), loss_func=nn.CrossEntropyLoss(), cbs=KD(Dense(), TaskLoss()+TAS()), metrics=[])
    with pytest.raises(ValueError, match=r'one class of several an item; the student predicts \(16, 10, 8, 8\)'): learn.fit(1)
def test_unequal_classes_are_refused():
    with pytest.raises(ValueError, match='the same classes are expected'): learner(net(s=1), cbs=KD(net(classes=7, s=2), TaskLoss()+TAS(ofa=False))).fit(1)

class Around(nn.Module):
    "The classifier also reads an early map"
    def __init__(self): super().__init__(); seed(6); self.layer1,self.layer2,self.layer3,self.fc = nn.Conv2d(1,4,3,1,1),nn.Conv2d(4,8,3,2,1),nn.Conv2d(8,8,3,2,1),nn.Linear(12,10)
    def forward(self, x):
        a = self.layer1(x)
        return self.fc(torch.cat([self.layer3(self.layer2(a.relu()).relu()).mean((2,3)), a.mean((2,3))], 1))
def test_says_why_a_network_cannot_be_cut():
    s = net(s=1); was = state(s)
    with pytest.raises(ValueError, match=r"the teacher \(Around\) cannot be cut at 'layer2'.*TAS\(tail=False\)"): learner(s, cbs=KD(Around(), TaskLoss()+TAS())).fit(1)
    assert_same(state(s), was)
    with pytest.raises(ValueError, match=r"the student \(Around\) cannot be cut at 'layer2'"): learner(Around(), cbs=KD(net(), TaskLoss()+TAS(first='teacher'))).fit(1)
    for s,t,kwargs in ((net(),Around(),dict(tail=False)),(Around(),net(),{})):                # what comes first need not be cut
        cb = KD(t, TaskLoss()+TAS(**kwargs)); learner(s, cbs=cb).fit(1); assert cb.history[-1]['tas']>0

class Flat(nn.Module):
    "One layer with a map"
    def __init__(self): super().__init__(); self.layer1,self.fc = nn.Conv2d(1,4,3,2,1),nn.Linear(4,10)
    def forward(self, x): return self.fc(self.layer1(x).relu().mean((2,3)))
@pytest.mark.parametrize('student,teacher', [(net,Flat),(Flat,net),(Flat,Flat)])
def test_a_network_of_one_stage(student, teacher):
    s = student(); was = state(s)
    with pytest.raises(ValueError, match=r"TAS\(\).*'stages\[-2\]'"): learner(s, cbs=KD(teacher(), TaskLoss()+TAS())).fit(1)
    assert_same(state(s), was)
    if student is net:                                                         # named, it does: the tail is the classifier
        cb = KD(teacher(), TaskLoss()+TAS().at(['layer2','embedding'], ['layer1','embedding'])); learner(s, cbs=cb).fit(1); assert cb.history[-1]['tas']>0

@pytest.mark.parametrize('layers,match', [(['layer2'],'reads two layers of each network'), (['layer1','layer2','embedding'],'here are 3'), (['embedding','layer2'],'no projector between'), (['layer3','layer2'],"'layer2' of the teacher does not come after 'layer3'")])
def test_other_layers(layers, match):
    with pytest.raises(ValueError, match=match): learner(net(s=1), cbs=KD(net(s=2), TaskLoss()+TAS().at(layers))).fit(1)

def test_a_batch_of_one_goes_without():
    n,seen = 33,[]
    cb = KD(ViT(), TaskLoss()+TAS()); learn = learner(net(bn=False), get_dls(n=n, drop_last=False, shuffle=False), cbs=[cb,At('after_loss', lambda l: seen.append((len(l.x),'tas' in cb._s.parts)) if l.training else None)])
    learn.fit(1)
    assert seen==[(32,True),(1,False)] and cb.history[-1]['tas']>0

# -- 7: the temperature

def test_temperature_is_learned():
    tas = TAS(tau=.1); cb = KD(ViT(), TaskLoss()+tas)
    learn = learner(net(s=1), cbs=cb); names = []
    learn.add_cb(At('after_epoch', lambda l: names.append(list(l.recorder.metric_names))))
    learn.fit(3)
    assert {'assistant_acc','tas_tau'}<=set(names[0])
    taus = [h['tas_tau'] for h in cb.history]
    assert abs(taus[0]-.1)<.03 and len(set(taus))==3 and tas.features.log_tau.exp().item()!=pytest.approx(.1, abs=1e-4)
def test_temperature_has_a_floor():
    s,t = pair('net', 'own')
    tas = TAS(); given = built(tas, s, t, ['layer2','blocks.2'], images('net'), Y[:6])
    with torch.no_grad(): tas.features.log_tau.fill_(-9.)
    assert tas(**given).isfinite() and tas.take_logged()['tas_tau']==pytest.approx(.01)
