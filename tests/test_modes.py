"Networks that run otherwise in training than in evaluation: fast paths, tuples, layers skipped, lost graphs, precision"
import copy
import warnings
from collections import namedtuple

import pytest
import torch
from fastai.callback.core import Callback,CancelFitException
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (KD,At,HalfCPU,Real,StepLosses,assert_close,assert_same,floating,get_dls,kl,learner,left,net,raising,
                    refuses,seed,state)
from fasterdistill.loss import FeatureLoss,TaskLoss,as_loss
from fasterdistill.losses import CC,FCFD,SRD,TAS,FitNet,InfoNCE,SoftTarget

def returned(model, name, x):
    "What a layer returns for `x`, by a hook of the test's own"
    got = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: got.append(out))
    model(x)
    handle.remove()
    return got[0]

def apart(fm_s, fm_t):
    "The mean squared distance of paired activations of one width, summed: no learned part"
    return sum((s-t).square().mean() for s,t in zip(fm_s.values(), fm_t.values(), strict=True))

def first_step(student, loss, teacher, n=32, cbs=(), **kwargs):
    "What one step of a fit trains: the loss, and the student's gradients"
    steps,grads = StepLosses(),{}
    kd = KD(teacher, loss, weight=1., **kwargs)
    learn = learner(student, get_dls(n=n, shuffle=False), cbs=[kd,steps,*cbs], metrics=[])
    learn.fit(1, lr=0.)
    return steps.vals[0],learn

# ---- PyTorch's fast path for transformers ----

class Encoder(nn.Module):
    "Rows of the picture as tokens; with `padded` the last two of all pictures but the first are none"
    def __init__(self, padded=False, s=0, d=16):
        super().__init__()
        seed(s)
        self.embed,self.padded = nn.Linear(8, d),padded
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 2*d, 0., batch_first=True), 2)
        self.fc = nn.Linear(d, 10)
    def forward(self, x):
        z = self.embed(x[:,0])
        mask = torch.zeros(z.shape[:2], dtype=torch.bool)
        mask[1:,6:] = True
        z = self.encoder(z, src_key_padding_mask=mask if self.padded else None)
        return self.fc(z[:,:6].mean(1))

class Held(Encoder):
    "Its encoder is frozen, and stays in evaluation mode while the rest trains"
    def __init__(self, *args):
        super().__init__(*args)
        self.encoder.requires_grad_(False)
    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

@pytest.mark.parametrize('layer', ['encoder.layers.0.linear2','encoder.layers.0','encoder.layers.1.norm2','encoder'])
@pytest.mark.parametrize('padded', [False,True])
@pytest.mark.parametrize('make', [Encoder,Held])
def test_inside_transformers(make, padded, layer):
    "The loss of the first step is that of hooks on networks that take the long way, since gradients are asked of them"
    student,teacher = make(padded),Encoder(padded, 1).eval()
    x = next(iter(get_dls(n=32, shuffle=False).train))[0].as_subclass(torch.Tensor)
    s,t = Encoder(padded).train(),Encoder(padded, 1).eval()
    want = apart({0: returned(s, layer, x)}, {0: returned(t, layer, x)})
    value,learn = first_step(student, as_loss(apart), teacher, activations_student=layer)
    assert abs(value-want.item()) < 1e-5*want
    assert torch.backends.mha.get_fastpath_enabled()
    assert not {*left(learn)}-{'optimizer'}                # fastai's leaves out what is frozen

def test_fast_path_comes_back_after_an_error():
    def broken(fm_s, fm_t):
        if not torch.is_grad_enabled(): return apart(fm_s, fm_t)     # the trial
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ZeroDivisionError('in a step')
    s = Encoder()
    kd = KD(Encoder(s=1), as_loss(broken), activations_student='encoder')
    learn = learner(s, get_dls(n=32), cbs=kd)
    with pytest.raises(ZeroDivisionError, match='in a step'): learn.fit(1)
    assert torch.backends.mha.get_fastpath_enabled()

# ---- activations without a graph ----

class Segments(nn.Module):
    "Stages `a` and `b` in one segment, which may be checkpointed or run without gradients while training"
    def __init__(self, how='plain', w=4):
        super().__init__()
        layers,self.how = net(w),how
        self.n = nn.ModuleDict(dict(a=layers.layer1, b=layers.layer2, c=layers.layer3))
        self.stem = nn.Conv2d(1, 1, 1)
        self.head = nn.Sequential(layers.pool, layers.flat, layers.fc)
    def body(self, x): return self.n.b(self.n.a(x))
    def forward(self, x):
        x = self.stem(x)
        if self.how in ('plain','frozen') or self.how!='no_grad' and not self.training: z = self.body(x)
        elif self.how=='no_grad':
            with torch.no_grad(): z = self.body(x)
        elif self.how=='detached': z = self.body(x.detach())
        elif self.how=='hidden': z = recomputed(self.body, x, reentrant=True)
        else: z = checkpoint(self.body, x, use_reentrant=self.how=='reentrant')
        return self.head(self.n.c(z))

def recomputed(f, x, reentrant): return checkpoint(f, x, use_reentrant=reentrant)

def grads_of(learn):
    "The student's gradients, of the step it takes next"
    got = {}
    def note(l): got.update({n: p.grad.clone() for n,p in l.model.named_parameters() if p.grad is not None})
    return At('after_backward', note),got

def taught(how, layer='n.a', **kwargs):
    "Gradients of the first step of FitNet alone"
    kd = KD(net(8, s=1), FitNet().at(layer, 'layer1'), weight=1., **kwargs)
    learn = learner(Segments(how), get_dls(n=32), cbs=kd)
    cb,got = grads_of(learn)
    learn.fit(1, cbs=cb)
    return got

def test_a_checkpoint_that_keeps_the_graph_teaches_as_none():
    plain,kept = taught('plain'),taught('kept')
    assert plain['stem.weight'].abs().sum()>0
    assert_close(plain, kept)

@pytest.mark.parametrize('how', ['reentrant','hidden','no_grad'])
def test_a_lost_graph_is_refused(how, teacher):
    "BatchNorm untouched, nothing left; what is outside of the segment can be read"
    loss = TaskLoss()+FitNet().at('n.a', 'layer1')
    learn = learner(Segments(how), get_dls(n=32), cbs=KD(teacher, loss))
    refuses(learn, r"'n\.a' of the student \(Segments\) returns an activation without a graph.*use_reentrant=False",
            teachers=[teacher])
    with pytest.raises(ValueError, match='without a graph'): learn.knowledge_distillation.plan()
    assert taught(how, 'n.c')['n.c.0.weight'].abs().sum()>0

def test_the_end_of_a_checkpoint_has_a_graph():
    "It is what the segment returns, which is computed again on the way back"
    assert_close(taught('plain', 'n.b'), taught('reentrant', 'n.b'))

def test_what_is_detached_on_the_way_is_refused_where_it_is_read(teacher):
    "What comes before `a` is not taught, but `a` is: a graph of its own, which is the network's business"
    assert taught('detached')['n.a.0.weight'].abs().sum()>0
    class Identity(Segments):
        def __init__(self):
            super().__init__()
            self.read = nn.Identity()
        def forward(self, x): return self.head(self.n.c(self.read(self.n.a(self.stem(x)).detach()).repeat(1,2,1,1)))
    learn = learner(Identity(), get_dls(n=32), cbs=KD(teacher, TaskLoss()+FitNet().at('read', 'layer1')))
    refuses(learn, "'read' of the student", teachers=[teacher])

class Freezes(Callback):
    "Freezes `a` after a number of batches"
    def __init__(self, after): self.after = after
    def before_batch(self):
        if self.training and self.iter==self.after:
            for m in (self.model.stem,self.model.n.a): m.requires_grad_(False)

def test_frozen_layers_go_on_with_a_warning(teacher):
    "As in fine_tune's first phase: once, with a line in the plan; unfrozen they are taught"
    student = Segments('frozen')
    for m in (student.stem,student.n.a): m.requires_grad_(False)
    learn = learner(student, get_dls(n=64), cbs=KD(teacher, TaskLoss()+FitNet().at(['n.a','n.b'], ['layer1','layer2'])))
    said = "'n.a' of the student (Segments): all that comes before is frozen"
    assert sum(said in a for a in learn.knowledge_distillation.plan().advice)==1
    with pytest.warns(UserWarning) as caught:
        learn.fit(2)
        learn.fit(1)
    assert sum(said in str(w.message) for w in caught)==1
    student.requires_grad_(True)
    learn.create_opt()
    cb,got = grads_of(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, cbs=cb)
    assert got['stem.weight'].abs().sum()>0
    assert learn.knowledge_distillation.plan().advice==[]

def test_what_is_frozen_in_the_middle_of_a_fit_goes_on_too(teacher):
    learn = learner(Segments(), get_dls(n=128), cbs=KD(teacher, TaskLoss()+FitNet().at('n.a', 'layer1')))
    with pytest.warns(UserWarning, match="'n.a' of the student .* is not taught any more") as caught:
        learn.fit(2, cbs=Freezes(2))
    assert len([w for w in caught if 'any more' in str(w.message)])==1

def test_what_a_rehearsal_does_not_foresee_is_refused_in_the_first_step(teacher):
    "Without a graph in steps alone, which nothing says beforehand: the averages of BatchNorm go back"
    class Odd(Segments):
        def forward(self, x):
            x,steps = self.stem(x),self.training and self.n.a._forward_hooks
            with torch.set_grad_enabled(torch.is_grad_enabled() and not steps): z = self.n.a(x)
            return self.head(self.n.c(self.n.b(z)))
    learn = learner(Odd(), get_dls(n=32), cbs=KD(teacher, TaskLoss()+FitNet().at('n.a', 'layer1')))
    refuses(learn, 'without a graph', teachers=[teacher])

# ---- what training alone returns and runs ----

Answer = namedtuple('Answer', 'logits aux')

class Aux(nn.Module):
    "As GoogLeNet: in training a second head, and a tuple of both answers; `plain`: the head runs, and is not returned"
    def __init__(self, w=4, plain=False, s=0):
        super().__init__()
        self.n,self.plain = net(w, s=s),plain
        self.aux = nn.Sequential(nn.Conv2d(2*w, 6, 1), nn.ReLU())
        self.second = nn.Linear(6, 10)
    def forward(self, x):
        n = self.n
        z = n.layer2(n.layer1(x))
        logits = n.fc(n.flat(n.pool(n.layer3(z))))
        if not self.training: return logits
        second = self.second(self.aux(z).mean((2,3)))
        return logits+0*second if self.plain else Answer(logits, second)

def of_both(out, y):
    "The loss of a network that returns a tuple in training"
    return nn.functional.cross_entropy(out if isinstance(out, torch.Tensor) else out.logits, y)

class Untouched(Callback):
    "Before the network trains nothing of it has moved, but for what is left of its own generator"
    order = 80
    def before_fit(self): self.was,self.rng = state(self.model),None
    def before_batch(self):
        if self.training and self.iter==0 and self.epoch==0: assert_same(state(self.model), self.was)

def first_answer(model):
    "What the network returns in training for the first batch, by itself"
    x = next(iter(get_dls(n=32, shuffle=False).train))[0].as_subclass(torch.Tensor)
    return copy.deepcopy(model).train()(x),x

@pytest.mark.parametrize('output,item', [(lambda o: o[1], 1), (lambda o: o.logits, 0), (lambda o: o.aux, 1), (1, 1),
                                         (None, 0)], ids=['second','logits','aux','position','default'])
def test_a_tuple_in_training_alone(output, item, teacher):
    "The loss is of the item that `output` finds in training; the plan says so too"
    model = Aux()
    out,x = first_answer(model)
    want = kl(out[item], teacher.eval()(x)).item()
    steps = StepLosses()
    kd = KD(teacher.train(), SoftTarget(), weight=1., output=output)
    learn = learner(model, get_dls(n=32, shuffle=False), loss_func=of_both, metrics=[], cbs=[kd,steps,Untouched()])
    was = state(model)
    value = kd.plan(learn).rows[0].value
    assert_same(state(model), was)
    learn.fit(1)
    assert abs(steps.vals[0]-want)<1e-6
    if output is not None: assert abs(value-want)<1e-6               # what settles it is a pass as in training
    assert len(learn.get_preds()[0])==64                             # validation is the network's own business
    learn.fit(1)                                                     # with what the first one found out
    assert left(learn, teacher)==[]

@pytest.mark.parametrize('output,match', [(5, 'the student returns 2 items, which has no 5'),
                                          (lambda o: o[5], 'output= failed on what the student returns, 2 items'),
                                          (lambda o: o.other, "Answer' object has no attribute 'other'")])
def test_what_training_does_not_return_is_refused(output, match, teacher):
    kd = KD(teacher, TaskLoss()+SoftTarget(), output=output)
    refuses(learner(Aux(), get_dls(n=32), loss_func=of_both, metrics=[], cbs=kd), match, teachers=[teacher])

@pytest.mark.parametrize('plain', [False,True])
@pytest.mark.parametrize('layer', ['aux','aux:pre','second:in'])
def test_layers_that_exist_in_training_alone(layer, plain, teacher):
    "Their activation on the first batch as training has it"
    model = Aux(plain=plain)
    name = dict({'aux:pre':'aux.0'}).get(layer, layer.removesuffix(':in'))
    x = first_answer(model)[1]
    got,twin = [],copy.deepcopy(model).train()
    twin.get_submodule(name).register_forward_hook(lambda m, a, out: got.append(a[0] if layer.endswith(':in') else out))
    twin(x)
    def size(fm_s): return fm_s[layer].square().mean()
    steps = StepLosses()
    kd = KD(teacher, as_loss(size), weight=1., activations_student=layer)
    learn = learner(model, get_dls(n=32, shuffle=False), loss_func=of_both, metrics=[], cbs=[kd,steps,Untouched()])
    learn.fit(1)
    want = got[0].square().mean().item()
    assert abs(steps.vals[0]-want)<1e-6
    assert left(learn, teacher)==[]

def test_cuts_beside_a_tuple(teacher):
    "A network is cut in evaluation, where it returns the prediction itself"
    at = [f'n.layer{i}' for i in (1,2,3)],[f'layer{i}' for i in (1,2,3)]
    kd = KD(teacher, TaskLoss()+FCFD().at(*at), output=lambda o: o.logits)
    learn = learner(Aux(), get_dls(n=32), loss_func=of_both, metrics=[], cbs=kd)
    learn.fit(1)
    assert left(learn, teacher)==[]

def test_googlenet(teacher):
    torchvision = pytest.importorskip('torchvision')
    model = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False)
    class Large(nn.Module):
        "Sees its pictures large and in colour"
        def __init__(self, m):
            super().__init__()
            self.m = m
        def forward(self, x): return self.m(nn.functional.interpolate(x, size=64).expand(-1,3,-1,-1))
    kd = KD(teacher, TaskLoss()+FitNet().at('aux1.conv', 'layer2')+SoftTarget(), output=lambda o: o.logits)
    learn = learner(Large(model), get_dls(n=4, bs=4, valid=4), loss_func=of_both, metrics=[], cbs=[kd,Untouched()])
    learn.fit(1, lr=1e-4)
    assert {'task_loss','fit_net','soft_target'} <= {*kd.parts}
    assert left(learn, teacher)==[]

# ---- layers that are skipped at random ----

class Dropped(nn.Module):
    "LayerDrop: each block is skipped with probability `p` while training; `draws` says which ran"
    def __init__(self, p=.5):
        super().__init__()
        seed(3)
        self.p,self.draws = p,[]
        self.stem,self.fc = nn.Conv2d(1, 8, 3, 2, 1),nn.Linear(8, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)) for _ in range(3))
    def forward(self, x):
        x,ran = self.stem(x),[]
        for i,block in enumerate(self.blocks):
            if self.training and torch.rand(()).item()<self.p: continue
            ran.append(i)
            x = x+block(x).relu()
        if self.training: self.ran = ran
        return self.fc(x.mean((2,3)))

class Notes(Callback):
    "Which blocks ran in each step, and what the losses were"
    order = 70
    def __init__(self): self.steps = []
    def before_backward(self):
        parts = dict(self.learn.knowledge_distillation.parts)
        self.steps.append((self.model.ran, parts, self.learn.loss.item(), self.learn.loss_grad.item()))

def of_layers(fm_s): return sum(z.square().mean() for z in fm_s.values())

@pytest.mark.parametrize('layers', [['blocks.2'],['blocks.0','blocks.2']])
def test_a_pair_that_did_not_run_is_left_out_of_the_step(layers, teacher):
    "Said once; the adapters of the others stay with their layers"
    loss,notes = TaskLoss()+FitNet().at(layers, ['layer2']*len(layers)),Notes()
    learn = learner(Dropped(), get_dls(n=32*24), metrics=[], cbs=[KD(teacher, loss),notes])
    with pytest.warns(UserWarning, match='did not run in this step') as caught: learn.fit(1)
    assert len([w for w in caught if 'did not run' in str(w.message)])==len(layers)
    numbers = {int(n[-1]) for n in layers}
    seen = set()
    for ran,parts,task,total in notes.steps:
        n = len(numbers & {*ran})
        seen.add(n)
        assert ('fit_net' in parts)==(n>0)
        assert total==pytest.approx(task+parts.get('fit_net', 0.), abs=1e-5)
    assert seen=={*range(len(layers)+1)}
    assert left(learn, teacher)==[]

def test_the_pairs_that_ran_are_those_of_the_step(teacher):
    "Two layers, without adapters, by hooks"
    class Squares(FeatureLoss):
        def pair(self, s, t): return s.square().mean()
    model,got = Dropped(),{}
    def note(i): return lambda m, args, out: got.update({i: out.square().mean().item()})
    for i in (0,2): model.blocks[i].register_forward_hook(note(i))
    notes = Notes()
    learn = learner(model, get_dls(n=32*12), metrics=[], cbs=[notes, At('before_batch', lambda l: got.clear()),
        KD(teacher, TaskLoss()+Squares().at(['blocks.0','blocks.2'], ['layer2','layer2']))])
    sums = []
    learn.add_cb(At('after_pred', lambda l: sums.append(sum(got.values())) if l.training else None))
    learn.fit(1)
    for (_,parts,*_),want in zip(notes.steps, sums, strict=True):
        assert parts.get('squares', 0.)==pytest.approx(want, abs=1e-6)

def test_a_loss_that_needs_all_its_layers_goes_without_the_step(teacher):
    notes = Notes()
    kd = KD(teacher, TaskLoss()+as_loss(of_layers), activations_student=['blocks.0','blocks.2'])
    learn = learner(Dropped(), get_dls(n=32*12), metrics=[], cbs=[kd,notes])
    learn.fit(1)
    assert {True,False}=={('of_layers' in parts) for _,parts,*_ in notes.steps}
    for ran,parts,*_ in notes.steps: assert ('of_layers' in parts)==({0,2} <= {*ran})

@pytest.mark.parametrize('model', [Dropped(1.), Aux(plain=True)], ids=['always_skipped','in_evaluation_alone'])
def test_a_layer_that_never_runs_is_an_error(model, teacher):
    "Though it runs in evaluation: BatchNorm and generators are as they were"
    if isinstance(model, Aux):
        class Evaluated(Aux):
            def forward(self, x):
                z = self.n.layer2(self.n.layer1(x))
                logits = self.n.fc(self.n.flat(self.n.pool(self.n.layer3(z))))
                return logits if self.training else logits+0*self.second(self.aux(z).mean((2,3)))
        model,layer = Evaluated(),'aux'
    else: layer = 'blocks.2'
    loss = TaskLoss()+FitNet().at(layer, 'layer2')
    learn = learner(model, get_dls(n=32), cbs=KD(teacher, loss))
    refuses(learn, 'does not run on this batch in training', teachers=[teacher])

class Experts(nn.Module):
    "A teacher that sends a batch to one of two experts, by its mean"
    def __init__(self):
        super().__init__()
        seed(1)
        self.experts,self.head = nn.ModuleList(nn.Linear(64, 12) for _ in range(2)),nn.Linear(12, 10)
    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.experts[int(x.mean()>self.middle)](x))

def test_an_expert_of_the_teacher_that_got_no_batch():
    experts,notes = Experts(),Notes()
    dls = get_dls(n=32*8, shuffle=False)
    means = [b[0].as_subclass(torch.Tensor).mean().item() for b in dls.train]
    experts.middle = sorted(means)[4]-1e-6
    first = int(means[0]>experts.middle)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    kd = KD(experts, TaskLoss()+FitNet().at('1', f'experts.{first}'))
    model.ran = None
    with pytest.warns(UserWarning, match=f"'experts.{first}' of the teacher .* did not run"):
        learner(model, dls, metrics=[], cbs=[kd,notes]).fit(1)
    assert [('fit_net' in parts) for _,parts,*_ in notes.steps]==[int(m>experts.middle)==first for m in means]

# ---- precision ----

def given(model):
    "The types that a network is given, as they come"
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    return seen

@pytest.mark.parametrize('amp', [False,True])
@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64], ids=str)
def test_a_teacher_of_another_precision(dtype, amp):
    "It is given its own type and computes in it, under autocast too"
    teacher = net(8, s=1).to(dtype).eval()
    out,x = first_answer(net(4))
    with torch.no_grad(): t = teacher(x.to(dtype)).to(torch.promote_types(dtype, torch.float32))
    with torch.autocast('cpu', torch.bfloat16, enabled=amp): s = net(4).train()(x).float()
    want,steps,seen = kl(s, t).item(),StepLosses(),given(teacher)
    kd = KD(teacher.train(), SoftTarget(), weight=1.)
    learn = learner(net(4), get_dls(n=32, shuffle=False), metrics=[], cbs=[kd,steps,*([HalfCPU()] if amp else [])])
    learn.fit(1)
    assert steps.vals[0]==pytest.approx(want, rel=1e-4)
    assert {*seen}=={dtype}

@pytest.mark.parametrize('amp', [False,True])
@pytest.mark.parametrize('loss', [FitNet,FCFD,lambda: FCFD(teacher_bn='batch')], ids=['fitnet','fcfd','batch'])
@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64], ids=str)
def test_layers_of_a_teacher_of_another_precision(dtype, loss, amp):
    "Near what the same teacher makes of it in float32, which is told by the value"
    if amp: cbs = [HalfCPU()]
    else: cbs = []
    values = []
    for kind in (dtype,torch.float32):
        steps,teacher = StepLosses(),net(8, s=1).to(kind)
        kd = KD(teacher, TaskLoss()+loss())
        learn = learner(net(4), get_dls(n=32, shuffle=False), metrics=[], cbs=[kd,steps,*cbs])
        learn.fit(1)
        assert left(learn, teacher)==[]
        values.append(steps.vals[0])
    assert values[0]==pytest.approx(values[1], rel=1e-2)

class Heard(FCFD):
    "Notes the types that predictions and activations have, those of passes resumed in the teacher too"
    def loss(self, fm_t, bridged, mixed, pred, teacher_pred, mixed_preds, *rest):
        self.kinds = {o.dtype for o in (*fm_t,*bridged,*(m for ms in mixed for m in ms),teacher_pred,*mixed_preds)}
        return super().loss(fm_t, bridged, mixed, pred, teacher_pred, mixed_preds, *rest)

@pytest.mark.parametrize('teacher', [torch.float64,torch.float32,torch.bfloat16], ids=str)
@pytest.mark.parametrize('student', [torch.float32,torch.float64], ids=str)
def test_a_teacher_is_heard_as_the_student_computes(student, teacher):
    with floating(student):
        loss = Heard(paths=4)
        learn = learner(net(4), get_dls(n=32), metrics=[], cbs=[KD(net(8, s=1).to(teacher), TaskLoss()+loss),Real()])
        learn.fit(1)
    assert loss.kinds=={student}

@pytest.mark.parametrize('loss', [InfoNCE,TAS,CC,SRD], ids=lambda o: o.__name__)
def test_learned_parts_on_a_teacher_of_less_precision(loss):
    "They are the student's, in float64"
    with floating(torch.float64):
        learn = learner(net(4), get_dls(n=32), metrics=[], cbs=[KD(net(8, s=1).float(), TaskLoss()+loss()),Real()])
        learn.fit(1)
    assert {p.dtype for p in learn.knowledge_distillation.loss.parameters()}<={torch.float64}

def test_an_ensemble_of_several_precisions():
    "Each member computes in its own"
    nets = [net(8, s=i).to(dtype) for i,dtype in enumerate((torch.float16,torch.float32,torch.float64))]
    seen = [given(n) for n in nets]
    learn = learner(net(4), get_dls(n=32), metrics=[], cbs=[KD(nets, SoftTarget()),HalfCPU()])
    learn.fit(1)
    assert [{*o} for o in seen]==[{torch.float16},{torch.float32},{torch.float64}]

class OfMany(nn.Module):
    "Runs under autocast alone: its head is half precision"
    def __init__(self):
        super().__init__()
        self.n = net(4)
        self.n.fc.bfloat16()
    def forward(self, x): return self.n(x)

@pytest.mark.parametrize('loss', [SoftTarget,lambda: FitNet().at('n.layer2','layer2'),
                                  lambda: FCFD().at([f'n.layer{i}' for i in (1,2,3)], [f'layer{i}' for i in (1,2,3)])],
                         ids=['predictions','layers','cuts'])
def test_a_student_that_runs_under_autocast_alone(loss, teacher):
    learn = learner(OfMany(), get_dls(n=64), metrics=[], cbs=[KD(teacher, TaskLoss()+loss()),HalfCPU()])
    at = At('before_validate', lambda l: l.model.float())
    learn.fit(1, cbs=at)
    assert left(learn, teacher)==[]

def test_the_trial_has_the_precision_of_the_training(teacher):
    "The types that a layer returns, in the example and in steps"
    model,kinds = net(4),[]
    model.layer2.register_forward_hook(lambda m, args, out: kinds.append(out.dtype))
    learn = learner(model, get_dls(n=64), metrics=[], cbs=[KD(teacher, FitNet()),HalfCPU()])
    learn.fit(1, cbs=At('before_validate', raising(CancelFitException())))
    assert {*kinds}=={torch.bfloat16}

def test_what_an_opening_makes_under_autocast_is_not_the_steps(teacher):
    "Autocast keeps copies of weights: made without gradients in the opening, they would take the step's"
    def run(*cbs):
        learn = learner(net(4), get_dls(n=32), metrics=[], cbs=[*cbs,HalfCPU()])
        cb,got = grads_of(learn)
        learn.fit(1, cbs=cb)
        return got
    assert_same(run(), run(KD(teacher, TaskLoss()+0.*SoftTarget())))
    assert_same(run(), run(KD(teacher, TaskLoss()+0.*FitNet())))

def depth():
    "How many autocasts are open"
    n = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return n-1

@pytest.mark.parametrize('where', ['opening','step'])
def test_autocast_ends_with_an_exception(where, teacher):
    "fastai opens it before the batch and closes it after the loss, if it comes to that"
    def broken(pred, teacher_pred):
        if where=='step' and not torch.is_grad_enabled(): return pred.sum()*0
        raise ZeroDivisionError(where)
    learn = learner(net(4), get_dls(n=32), cbs=[KD(teacher, TaskLoss()+as_loss(broken)),HalfCPU()])
    was = depth()
    refuses(learn, where, teachers=[teacher], error=ZeroDivisionError)
    assert not torch.is_autocast_enabled('cpu')
    assert depth()==was

@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['fp16','bf16'])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.bfloat16], ids=str)
def test_mixed_precision_on_a_gpu(dtype, mode):
    "fastai's own: the plan and the fit, and the end of it"
    dls = get_dls(n=96)
    dls.to('cuda')
    teacher = net(8, s=1).to(dtype)
    kd = KD(teacher, TaskLoss()+SoftTarget()+FCFD())
    learn = learner(net(4), dls, metrics=[], cbs=[kd,MixedPrecision(amp_mode=mode)])
    assert len(kd.plan(learn).rows)==3
    learn.fit(2)
    assert not torch.is_autocast_enabled('cuda')
    assert left(learn, teacher)==[]
