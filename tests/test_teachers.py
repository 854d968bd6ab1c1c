"Every kind of teacher in a real fit: what it is given and says, numbers against plain PyTorch, and what is refused"
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import (KD,At,Out,StepLosses,Watch,X,Y,asked,assert_same,flags,get_dls,learner,left,net,refuses,rnn,seed,
                    state,tuples)
from fastai.data.transforms import Normalize
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,MSELossFlat
from fastai.optimizer import SGD
from torch import nn

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.logits import BinarySoftTarget,SoftTarget
from fasterdistill.teachers.teacher import Called,Ensemble,Frozen,Teacher,as_teacher

class Heard(DistillLoss):
    "Keeps what the teacher says, and to what"
    def __init__(self): self.said = []
    def forward(self, pred, teacher_pred, xb):
        self.said.append((xb,teacher_pred))
        return (pred.mean()-teacher_pred.mean())**2

def heard(teacher, learn=None):
    "The inputs and the teacher's predictions of each training batch of a fit"
    loss = Heard()
    learn = learn or learner(metrics=[])
    seed(3)
    learn.fit(1, cbs=KD(teacher, TaskLoss()+loss))
    said = loss.said[1:]                                   # the first is the trial
    assert len(said)==3
    assert not any(t.requires_grad for _,t in said)
    assert all(t.dtype==torch.float32 for _,t in said)
    return said

def close(a, b, tol=1e-5): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

# ---- what may teach ----

def test_a_module(teacher):
    modes = []
    teacher.fc.register_forward_hook(lambda m,a,o: modes.append((torch.is_grad_enabled(),m.training,o.requires_grad)))
    teacher.layer2.requires_grad_(False)
    teacher.layer1.eval()
    was,had = state(teacher),flags(teacher)
    for (x,),t in heard(teacher):
        assert type(x) is torch.Tensor
        assert torch.equal(t, asked(teacher, x))
    assert set(modes[:-3])=={(False,False,False)}
    assert_same(was, state(teacher))
    assert flags(teacher)==had

def test_a_learner(teacher):
    learn = learner(teacher, get_dls())
    cbs = list(learn.cbs)
    for (x,),t in heard(learn): assert torch.equal(t, asked(teacher, x))
    assert list(learn.cbs)==cbs
    assert learn.model is teacher
    assert left(learn)==[]
    learn.fit(1)                                            # it can be trained again

def test_an_exported_learner(teacher, tmp_path):
    learner(teacher, get_dls(), path=tmp_path).export('t.pkl')
    for path in (tmp_path/'t.pkl', str(tmp_path/'t.pkl')):
        for (x,),t in heard(path): assert torch.equal(t, asked(teacher, x))
    with pytest.raises(FileNotFoundError): KD(tmp_path/'none.pkl')

def test_a_function(teacher):
    teacher.eval()
    def f(x): return teacher(x)                             # no graph, whatever the function does
    for (x,),t in heard(lambda x: 2*teacher(x).detach()): assert torch.equal(t, 2*asked(teacher, x))
    for (x,),t in heard(f): assert torch.equal(t, asked(teacher, x))
    with pytest.raises(ValueError, match='reads the layers of one network'): KD(f, TaskLoss()+FitNet())

class Flat(DistillLoss):
    def forward(self, pred): return pred.pow(2).mean()

def test_none():
    learn = learner()
    learn.fit(1, cbs=KD(None, TaskLoss()+Flat()))
    assert left(learn)==[]

class Own(Teacher):
    "Says the label, and notes how it is called"
    def __init__(self): self.calls = []
    def setup(self, learn): self.calls.append('setup')
    def close(self): self.calls.append('close')
    def reset(self): self.calls.append('reset')
    def after_step(self, learn): self.calls.append('step')
    def forward(self, xb, idx, pred): return F.one_hot(Y[idx], 10).float()+0*pred

def test_own_teacher():
    "A Teacher reads by name, is set up, reset, told of steps and closed"
    own,loss,learn,labels = Own(),Heard(),learner(),[]
    def note(l):
        if l.training: labels.append(F.one_hot(l.y, 10).float())
    learn.fit(2, cbs=[KD(own, TaskLoss()+loss),At('after_pred', note)])
    said = [t for _,t in loss.said[1:]]
    assert all(torch.equal(t, y) for t,y in zip(said, labels, strict=True))      # idx counts the items, if shuffled too
    assert own.calls[:2]==['reset','setup']
    assert own.calls.count('step')==6
    assert own.calls.count('reset')==2
    assert own.calls[-1]=='close'
    assert left(learn)==[]

def test_what_cannot_teach(teacher):
    with pytest.raises(TypeError, match='3 cannot teach'): as_teacher(3)
    with pytest.raises(TypeError, match='the class Linear: expected a trained network'): as_teacher(nn.Linear)
    with pytest.raises(TypeError, match='expected a module'): Frozen(3)
    with pytest.raises(ValueError, match='at least one'): as_teacher([])
    with pytest.raises(ValueError, match="kind='some'"): Ensemble([teacher], kind='some')
    with pytest.raises(ValueError, match='belong together'): Frozen(teacher, mean=[.5])
    with pytest.raises(TypeError, match='cannot teach'): as_teacher([teacher,3])

misplaced = {'one': SoftTarget(), 'with layers': FitNet().at('fc'), 'a sum': .1*TaskLoss()+SoftTarget(),
             'a class': SoftTarget, 'a partial': partial(SoftTarget, T=2)}
takes = dict(by_itself=as_teacher, frozen=Frozen, callback=KD, swapped=lambda o: KD(o, net()),
             twice=lambda o: KD(o, SoftTarget()), listed=lambda o: as_teacher([net(),o]),
             ensemble=lambda o: Ensemble([o,net()]))

@pytest.mark.parametrize('wrong', misplaced)
@pytest.mark.parametrize('place', takes)
def test_a_loss_in_the_teachers_place(wrong, place):
    says = r'is a loss, not a teacher: the teacher comes first, KnowledgeDistillationCallback\(teacher, loss\)'
    with pytest.raises(TypeError, match=says): takes[place](misplaced[wrong])

def test_a_partial_is_a_function(teacher):
    assert isinstance(as_teacher(partial(teacher)), Called)         # of the inputs, whatever it is of, but for a loss

# ---- outputs ----

class PickedCE(nn.CrossEntropyLoss):
    def __init__(self, get):
        super().__init__()
        self.get = get
    def forward(self, pred, y): return super().forward(self.get(pred), y)

outputs = dict(                                            # what a network returns, `output`, and how to get it by hand
    tuple=(lambda o: (o,o.sum()), None, lambda o: o[0]),
    list=(lambda o: [o,3], None, lambda o: o[0]),
    logits=(lambda o: dict(logits=o, loss=0), None, lambda o: o['logits']),
    position=(lambda o: (0,o), 1, lambda o: o[1]),
    last=(lambda o: (0,o), -1, lambda o: o[-1]),
    key=(lambda o: dict(out=o), 'out', lambda o: o['out']),
    function=(lambda o: dict(a=[o]), lambda d: d['a'][0], lambda d: d['a'][0]))

@pytest.mark.parametrize('f,output,get', outputs.values(), ids=outputs)
def test_outputs(teacher, f, output, get):
    "A tuple's first item and a dict's 'logits' by themselves, else `output`; of the teacher and of the student"
    for (x,),t in heard(Frozen(Out(teacher, f), output=output)): assert torch.equal(t, asked(teacher, x))
    def run(student, loss_func, **kwargs):
        learn = learner(student, loss_func=loss_func, metrics=[])
        seed(3)
        learn.fit(1, cbs=KD(teacher, TaskLoss()+SoftTarget()+FitNet(), **kwargs))
        return learn.model
    a,b = run(net(), CrossEntropyLossFlat()),run(Out(net(), f), PickedCE(get), output=output)
    assert_same(state(a), state(b.m))

@pytest.mark.parametrize('f,output,has', [
    (lambda o: dict(a=o, b=o), None, "a dict with 'a', 'b'"),
    (lambda o: dict(a=o), 'c', "a dict with 'a', which has no 'c'"),
    (lambda o: (o,), 3, '1 items, which has no 3'), (lambda o: None, None, 'a NoneType')])
def test_outputs_not_found(teacher, f, output, has):
    says = f'the teacher returns {has}.*say where the prediction is'
    with pytest.raises(ValueError, match=says): heard(Frozen(Out(teacher, f), output=output))

# ---- inputs ----

def normalised(stats, **kwargs):
    "Digits with these statistics, or as they are"
    if stats is None: return get_dls(**kwargs)
    mean,std = stats
    return get_dls(after_batch=[Normalize.from_stats([mean], [std], dim=1, cuda=False)], **kwargs)

def test_mean_std_size(teacher):
    "A bare module sees what the student sees; with `mean` and `std` its own normalisation, from the student's"
    m,s = .4,.25
    for (x,),t in heard(Frozen(teacher, mean=[m], std=[s], size=16)):
        z = F.interpolate((x-m)/s, (16,16), mode='bilinear', align_corners=False, antialias=True)
        close(t, asked(teacher, z))
    for (x,),t in heard(Frozen(teacher, mean=[m], std=[s], size=(8,8)), learner(dls=normalised((.1,.5)))):
        close(t, asked(teacher, (x*.5+.1-m)/s))
        assert x.min().item()==pytest.approx(-.2)
    for (x,),t in heard(teacher, learner(dls=normalised((.1,.5)))): assert torch.equal(t, asked(teacher, x))

@pytest.mark.parametrize('mine,theirs', [
    ((.1,.5),(.3,.2)), (None,(.3,.2)), ((.1,.5),None), ((.1,.5),(.1,.5)), (None,None)])
def test_normalisation_of_a_learner(teacher, mine, theirs):
    "A Learner's own statistics are met, whatever the student's"
    (m0,s0),(m1,s1) = mine or (0,1),theirs or (0,1)
    for (x,),t in heard(learner(teacher, normalised(theirs)), learner(dls=normalised(mine))):
        close(t, asked(teacher, (x*s0+m0-m1)/s1))
        if mine==theirs: assert torch.equal(t, asked(teacher, x))

def test_maps_of_a_teacher_with_other_inputs(teacher):
    "Its layers are read in the same pass, at its own size"
    sizes,learn = [],learner()
    watch = Watch(lambda fm_t, **k: sizes.append([o.shape[2] for o in fm_t.values()]))
    learn.fit(1, cbs=KD(Frozen(teacher, size=16), TaskLoss()+FitNet()+watch))
    assert len(sizes)==4
    assert sizes==[sizes[0]]*4
    assert left(learn, teacher)==[]

class TwoInputs(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.a,self.b,self.fc = nn.Linear(64, w),nn.Linear(64, w),nn.Linear(w, 10)
    def forward(self, x, y): return self.fc((self.a(x)+self.b(y)).relu())

def two_inputs():
    "A student of two inputs"
    flat = X[:96].flatten(1)
    dls = tuples([*flat,*flat], [*flat.flip(1)*2]*2, [*Y[:96]]*2, valid=96, shuffle=True)
    return learner(TwoInputs(4), dls, metrics=[])

chosen = [                                                 # `inputs`, and the same by hand
    (1, lambda x,y: y), ([0], lambda x,y: x), (lambda x,y: x+y, lambda x,y: x+y), (lambda x,y: (x-y,), lambda x,y: x-y)]

def test_two_inputs():
    seed()
    t,one = TwoInputs(16),nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    for (x,y),p in heard(t, two_inputs()): assert torch.equal(p, asked(t, x, y))
    for (x,y),p in heard(Frozen(t, inputs=[1,0]), two_inputs()): assert torch.equal(p, asked(t, y, x))
    for inputs,f in chosen:
        for (x,y),p in heard(Frozen(one, inputs=inputs), two_inputs()): assert torch.equal(p, asked(one, f(x, y)))
    other = learner(one, tuples(X.flatten(1), Y), metrics=[])
    with pytest.raises(ValueError, match=r'takes 1 input\(s\), the student 2'): heard(other, two_inputs())

def test_tabular():
    "fastai's own tabular model: categories and numbers, labels as a column"
    import pandas as pd
    from fastai.data.block import CategoryBlock
    from fastai.tabular.core import Categorify
    from fastai.tabular.data import TabularDataLoaders
    from fastai.tabular.model import TabularModel
    flat = X[:96].flatten(1)
    df = pd.DataFrame(dict(a=[str(i%3) for i in range(96)], b=flat[:,20].numpy(), c=flat[:,30].numpy(),
                           y=[str(i) for i in Y[:96].tolist()]))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['a'], cont_names=['b','c'], y_names='y',
                                     y_block=CategoryBlock(), valid_idx=list(range(64, 96)), bs=32)
    seed()
    t,s = TabularModel([(4,3)], 2, 10, [16]),TabularModel([(4,3)], 2, 10, [8])
    learn,loss = learner(s, dls, metrics=[]),Heard()
    learn.fit(1, cbs=KD(t, TaskLoss()+SoftTarget()+loss))
    assert all(torch.equal(p, asked(t, *xb)) for xb,p in loss.said[1:])
    assert len(loss.said)==3
    assert left(learn, t)==[]

def language_model(h, s):
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import LinearDecoder,SequentialRNN
    seed(s)
    encoder = AWD_LSTM(20, 8, h, 2, hidden_p=0., input_p=0., embed_p=0., weight_p=.1)
    return SequentialRNN(encoder, LinearDecoder(20, 8, output_p=0.))

def test_language_model():
    """Tuple outputs reduced as RNNCallback reduces the student's;
    hidden state forgotten between epochs, and as it was afterwards"""
    texts = torch.randint(0, 20, (32,7))
    student,t,loss = language_model(10, 0),language_model(12, 1),Heard()
    learn = learner(student, tuples([*texts,*texts], [*texts,*texts], n=32, valid=32, bs=8), opt_func=SGD, metrics=[],
                    cbs=rnn())
    learn.fit(2, .01, cbs=KD(t, TaskLoss()+SoftTarget()+loss))
    said = loss.said[1:]
    assert len(said)==8
    assert left(learn)==[]
    m = language_model(12, 1).eval()
    for e in range(2):
        m.reset()
        for (x,),p in said[4*e:4*e+4]:
            with torch.no_grad(): torch.testing.assert_close(p, m(x)[0])
    m.reset()
    (x,),p = said[1]
    with torch.no_grad(): assert (m(x)[0]-p).abs().max()>1e-5       # the state went on from batch to batch

# ---- classes ----

names = [f'c{i}' for i in range(10)]
perm = [3,1,4,0,5,9,2,6,8,7]
def called(y): return f'c{y}'
def three():
    "A student of three of these classes"
    return learner(net(classes=3), get_dls(vocab=['c7','c2','c5'], label=lambda y: f'c{(2,5,7)[y%3]}'))

def test_permuted_vocab(teacher):
    theirs = [names[i] for i in perm]
    tl = learner(teacher, get_dls(vocab=theirs, label=called))
    for (x,),t in heard(tl, learner(dls=get_dls(vocab=names, label=called))):
        want = asked(teacher, x)
        for j,name in enumerate(names): assert torch.equal(t[:,j], want[:,theirs.index(name)])

def test_vocab_with_more_and_without(teacher):
    tl = learner(teacher, get_dls(vocab=names, label=called))
    for (x,),t in heard(tl, three()): assert torch.equal(t, asked(teacher, x)[:,[7,2,5]])
    more = learner(net(classes=12), get_dls(vocab=[*names,'cat','dog'], label=called))
    says = r"the teacher does not know 2 of the student's 12 classes: 'cat', 'dog'; it knows 'c0'"
    with pytest.raises(ValueError, match=says): heard(tl, more)

def test_classes_said(teacher):
    for classes in ([7,2,5], names):
        for (x,),t in heard(Frozen(teacher, classes=classes), three()):
            assert torch.equal(t, asked(teacher, x)[:,[7,2,5]])
    with pytest.raises(ValueError, match='classes= asks for output 12, the teacher has 10'):
        heard(Frozen(teacher, classes=[1,2,12]), three())
    with pytest.raises(ValueError, match=r"does not know 1 of the student's 3 classes: 'c7'"):
        heard(Frozen(teacher, classes=[n for n in names if n!='c7']), three())
    with pytest.raises(ValueError, match='the same classes are expected'):
        learner().fit(1, cbs=KD(Frozen(teacher, classes=[1,2]), SoftTarget()))

def test_numbered_classes_in_another_order(teacher):
    "Whole numbers as classes are names too, if a Learner's vocab says them"
    for (x,),t in heard(learner(teacher, get_dls(vocab=perm))):
        assert torch.equal(t, asked(teacher, x)[:,[perm.index(i) for i in range(10)]])

def test_tokens_differ(teacher):
    def text(*tokens):
        dls = get_dls()
        dls.vocab = [list(tokens),list(range(10))]
        return dls
    a,b = ['xxunk','the','cat'],['xxunk','the','dog','cat']
    for (x,),t in heard(learner(teacher, text(*a)), learner(dls=text(*a))): assert torch.equal(t, asked(teacher, x))
    says = (r"the student does not know 1 of the teacher's 4 tokens: 'dog'; "
            ".*Make the student's data with the teacher's vocab")
    with pytest.raises(ValueError, match=says): heard(learner(teacher, text(*b)), learner(dls=text(*a)))

@pytest.mark.parametrize('loss_func,act,back', [
    (CrossEntropyLossFlat(), lambda o: o.softmax(1), lambda o: o.log_softmax(1)),
    (BCEWithLogitsLossFlat(), torch.sigmoid, lambda o: o)])
def test_probabilities(teacher, loss_func, act, back):
    for (x,),t in heard(Frozen(Out(teacher, act), probabilities=True), kind(loss_func)):
        close(t, back(asked(teacher, x)), 1e-4)

# ---- several ----

def kind(loss_func, student=None):
    "A Learner with labels that suit the loss function"
    if isinstance(loss_func, CrossEntropyLossFlat): return learner(student, loss_func=loss_func, metrics=[])
    labels = F.one_hot(Y[:96], 10).float()
    dls = tuples([*X[:96]]*2, [*labels]*2, valid=96, drop_last=True)
    return learner(student, dls, loss_func=loss_func, metrics=[])

def of_probabilities(zs): return (sum(z.exp()/z.exp().sum() for z in zs)/3).log()
def of_sigmoids(zs):
    p = sum(1/(1+(-z).exp()) for z in zs)/3
    return (p/(1-p)).log()
def of_values(zs): return sum(zs)/3

@pytest.mark.parametrize('loss_func,what,average', [
    (CrossEntropyLossFlat(), 'log of the mean probability', of_probabilities),
    (BCEWithLogitsLossFlat(), 'logit of the mean sigmoid', of_sigmoids),
    (MSELossFlat(), 'mean of the values', of_values)], ids=['single','multi','regression'])
def test_ensemble(loss_func, what, average):
    ts,learn = [net(w, s=w) for w in (4,6,8)],kind(loss_func)
    for t in ts: t.fc.weight.data *= 20
    assert what in repr(KD(ts).plan(learn))
    for (x,),got in heard(ts, learn):
        zs = [asked(t, x).double() for t in ts]
        for b in range(0, 32, 5): close(got[b].double(), average([z[b] for z in zs]), 2e-4)
    assert left(learn, *ts)==[]
    learn.fit(1, cbs=KD(ts))                                # with the loss that suits
    assert left(learn, *ts)==[]

def test_ensemble_of_one_is_the_teacher(teacher):
    for (x,),t in heard([teacher]): torch.testing.assert_close(t.softmax(1), asked(teacher, x).softmax(1))

def test_ensemble_of_kinds(teacher):
    "Each brings its own inputs and classes"
    tl = learner(net(6, s=2), normalised((.3,.2), vocab=perm))
    for (x,),t in heard([teacher, tl, lambda x: torch.zeros(len(x), 10)]):
        theirs = asked(tl.model, (x-.3)/.2).softmax(1)[:,[perm.index(i) for i in range(10)]]
        close(t, ((asked(teacher, x).softmax(1)+theirs+.1)/3).log(), 1e-4)

def some_loss(p, y):
    "A loss function that says nothing of the task"
    return F.cross_entropy(p, y)

def test_ensemble_of_doubles():
    "What is finer than float32 stays so, what is coarser is averaged in float32"
    for dtype,want in ((torch.float64,torch.float64),(torch.float16,torch.float32),(torch.int64,torch.float32)):
        z = torch.tensor([[1,2]]).to(dtype)
        assert Ensemble([lambda x: z, lambda x: z], kind='regression').forward((X[:1],)).dtype==want

def test_ensemble_refuses(teacher):
    for loss in (TaskLoss()+FitNet(), Attention(), TaskLoss()+Watch()):
        with pytest.raises(ValueError, match='reads the layers of one network, which Ensemble'):
            KD([teacher,net(4)], loss)
    with pytest.raises(ValueError, match=r'return \(32, 10\) and \(32, 7\)'): heard([teacher,net(8, classes=7)])
    with pytest.raises(ValueError, match='how to average an ensemble.*kind='):
        heard([teacher,net(4)], learner(loss_func=some_loss, metrics=[]))
    heard(Ensemble([teacher,net(4)], kind='single'), learner(loss_func=some_loss, metrics=[]))

@pytest.mark.parametrize('loss,loss_func', [
    (SoftTarget,BCEWithLogitsLossFlat()), (SoftTarget,MSELossFlat()), (BinarySoftTarget,CrossEntropyLossFlat()),
    (BinarySoftTarget,MSELossFlat())])
def test_loss_that_does_not_suit(teacher, loss, loss_func):
    refuses(kind(loss_func), 'use (Logits|BinarySoftTarget|SoftTarget)', KD(teacher, loss()), teachers=[teacher])

# ---- teachers that are no ordinary modules ----

def exported(model):
    from torch.export import Dim,export
    any_number = getattr(Dim, 'AUTO', None) or Dim('items', min=2)       # torch 2.4 has no AUTO
    return export(model, (X[:32],), dynamic_shapes=({0:any_number},))

def offloaded(model):
    from accelerate import cpu_offload
    return cpu_offload(model, execution_device='cpu')

class Answers(Out):
    "What a teacher says, as something else"
    def __init__(self, how): super().__init__(net(8, s=1), how)

class Inference(Answers):
    @torch.inference_mode()
    def forward(self, x): return super().forward(x)

class NoGrad(Answers):
    @torch.no_grad()
    def forward(self, x): return super().forward(x)

class Detached(Answers):
    "Detaches behind its second stage"
    def __init__(self):
        super().__init__(lambda o: o)
        self.m.layer3.register_forward_pre_hook(lambda m, args: (args[0].detach(),))

def as_array(o): return o.detach().numpy()
def as_list(o): return o.tolist()
def asked_at(how): return lambda x: how(asked(net(8, s=1), x))

kinds = dict(
    scripted=lambda: torch.jit.script(net(8, s=1)),
    traced=lambda: torch.jit.trace(net(8, s=1).eval(), X[:4]),
    frozen=lambda: torch.jit.freeze(torch.jit.script(net(8, s=1).eval())),
    program=lambda: exported(net(8, s=1).eval()),
    module_of_a_program=lambda: exported(net(8, s=1).eval()).module(),
    offloaded=lambda: offloaded(net(8, s=1)),
    array=lambda: Answers(as_array), lists=lambda: Answers(as_list), inference=lambda: Inference(lambda o: o),
    function_of_an_array=lambda: asked_at(as_array), function_of_lists=lambda: asked_at(as_list),
    function_in_inference=lambda: torch.inference_mode()(asked_at(lambda o: o)))

@pytest.mark.parametrize('kind', kinds)
def test_no_ordinary_module(kind):
    "Teaches as the network that it was made from"
    def losses(teacher):
        steps = StepLosses()
        learn = learner(net(), get_dls(n=64), cbs=[KD(teacher, TaskLoss()+SoftTarget()),steps])
        learn.knowledge_distillation.plan()
        learn.fit(1)
        return steps.vals
    got,want = losses(kinds[kind]()),losses(net(8, s=1))
    assert len(got)==2
    assert got==pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize('make,layer', [(kinds['offloaded'],'layer2'), (kinds['inference'],'m.layer2')])
def test_layers_of_no_ordinary_module(make, layer):
    def value(t, layer):
        learn = learner(net(), get_dls(n=32), cbs=KD(t, FitNet().at('layer2', layer)))
        learn.fit(1)
        return learn.knowledge_distillation.parts['fit_net']
    assert value(make(), layer)==pytest.approx(value(net(8, s=1), 'layer2'))

def test_an_offloaded_teacher_stays_where_it_is():
    t = offloaded(net(8, s=1))
    learner(net(), get_dls(n=32), cbs=KD(t, SoftTarget())).fit(1)
    assert {p.device.type for p in t.parameters()}=={'meta'}
    assert {b.device.type for b in t.buffers()}=={'cpu'}
    torch.testing.assert_close(t.eval()(X[:4]), asked(net(8, s=1), X[:4]))

inside = [f'm.layer{i}' for i in (1,2,3)]

@pytest.mark.parametrize('make,loss,match', [
    (kinds['scripted'], FitNet().at('layer2'), 'run as a whole, and their layers cannot be read'),
    (kinds['program'], FitNet().at('layer2'), 'give the network that it was made from'),
    (lambda: exported(net(8).train()), SoftTarget(), 'exported in training mode'),
    (lambda: net(8).to('meta'), SoftTarget(), "no data in 'layer1.0.weight'"),
    (lambda: (lambda x: None), SoftTarget(), 'returns a NoneType'),
    (lambda: (lambda x: list(x)), SoftTarget(), 'returns 32 items: expected a tensor'),
    (kinds['inference'], FCFD().at([n[2:] for n in inside], inside), 'forward runs under torch.inference_mode'),
    (lambda: NoGrad(lambda o: o), FCFD().at([n[2:] for n in inside], inside), 'runs under torch.no_grad'),
    (Detached, FCFD().at([n[2:] for n in inside], inside), "cut at 'm.layer[12]'.*is detached"),
])
def test_what_cannot_teach_is_refused(make, loss, match):
    teacher = make()
    refuses(learner(net(), get_dls(n=32)), match, KD(teacher, TaskLoss()+loss))

# ---- what goes wrong inside a teacher's own forward ----

class Wants(nn.Module):
    "Takes pictures of three channels and 16 pixels"
    def __init__(self):
        super().__init__()
        self.conv,self.fc = nn.Conv2d(3, 4, 4, 4),nn.Linear(64, 10)
    def forward(self, x): return self.fc(self.conv(x).flatten(1))

@pytest.mark.parametrize('make,loss', [(lambda: Wants(), SoftTarget()), (lambda: Wants(), FitNet()),
                                       (lambda: [net(8), Wants()], SoftTarget())])
def test_an_error_of_the_teachers_own(make, loss):
    match = r'(?s)the teacher \(Wants\) failed in its own forward, given \(32, 1, 8, 8\).*3 channels.*size=.*inputs='
    refuses(learner(net(), get_dls(n=32)), match, KD(make(), loss), error=RuntimeError)

def test_a_teacher_of_fewer_words():
    "And one whose positions end before the text does"
    x = torch.randint(0, 60, (96,12))
    student = nn.Sequential(nn.Embedding(60, 4), nn.Flatten(), nn.Linear(48, 10))
    def learn(): return learner(student, tuples(x, Y[:96], n=64, valid=32), metrics=[])
    few = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(48, 10))
    short = nn.Sequential(nn.Embedding(60, 4), nn.Flatten(), nn.Linear(32, 10))
    for t,error in ((few,IndexError),(short,RuntimeError)):
        match = r'(?s)the teacher \(Sequential\) failed in its own forward, given \(32, 12\).*inputs='
        refuses(learn(), match, KD(t, SoftTarget()), error=error)

def test_what_the_error_offers_helps():
    t = Frozen(Wants(), size=16, inputs=lambda x: x.expand(-1,3,-1,-1))
    learner(net(), get_dls(n=32), cbs=KD(t, SoftTarget())).fit(1)
