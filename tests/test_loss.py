"What every loss can do by itself: be weighed and added, say what it logged, know its networks, be tried"
import gc,pickle,weakref
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

import fasterdistill.losses as losses
from fasterdistill.loss import (DistillLoss,FeatureLoss,Function,Sum,TaskLoss,Weight,
                                after,as_loss,name_terms,ramp,steps)
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.logits import Logits,SoftTarget

# ---- sums and weights ----

def squares(pred, teacher_pred, **kwargs): return (pred-teacher_pred).pow(2).mean()
def fade(pos): return 1-pos

S,T,Q = 'SoftTarget()','TaskLoss()','squares'
sums = [
    (lambda: .1*SoftTarget,                      f'0.1*{S}'),
    (lambda: SoftTarget*2,                       f'2*{S}'),
    (lambda: SoftTarget/2,                       f'0.5*{S}'),
    (lambda: SoftTarget()/2,                     f'0.5*{S}'),
    (lambda: SoftTarget()/4/2,                   f'0.5*(0.25*{S})'),
    (lambda: (SoftTarget + TaskLoss)/2,          f'0.5*{S} + 0.5*{T}'),
    (lambda: SoftTarget + TaskLoss,              f'{S} + {T}'),
    (lambda: SoftTarget + TaskLoss(),            f'{S} + {T}'),
    (lambda: SoftTarget() + TaskLoss,            f'{S} + {T}'),
    (lambda: sum([SoftTarget,TaskLoss]),         f'{S} + {T}'),
    (lambda: TaskLoss + squares,                 f'{T} + {Q}'),
    (lambda: squares + TaskLoss,                 f'{Q} + {T}'),
    (lambda: squares + TaskLoss(),               f'{Q} + {T}'),
    (lambda: TaskLoss + partial(SoftTarget, T=2), f'{T} + SoftTarget(T=2)'),
    (lambda: ramp(3)*SoftTarget,                 f'ramp(3)*{S}'),
    (lambda: SoftTarget*ramp(3),                 f'ramp(3)*{S}'),
    (lambda: fade*SoftTarget,                    f'fade*{S}'),
    (lambda: ramp(3)*after(2)*SoftTarget(),      f'ramp(3)*after(2)*{S}'),
    (lambda: ramp(3)*(after(2)*SoftTarget()),    f'ramp(3)*(after(2)*{S})'),
    (lambda: .5*ramp(3)*after(2)*SoftTarget,     f'0.5*ramp(3)*after(2)*{S}'),
    (lambda: ramp(3)/2*SoftTarget,               f'ramp(3)/2*{S}'),
    (lambda: (ramp(3)*steps({0:2})/2)*SoftTarget, f'ramp(3)*steps({{0: 2}})/2*{S}'),
    (lambda: ramp(3)*squares,                    f'ramp(3)*{Q}'),
    (lambda: squares*ramp(3),                    f'ramp(3)*{Q}'),
    (lambda: ramp(3)*partial(SoftTarget, T=2),   'ramp(3)*SoftTarget(T=2)'),
    (lambda: .1*as_loss(squares),                f'0.1*{Q}'),
]

@pytest.mark.parametrize('make,text', sums, ids=[text for _,text in sums])
def test_sums(make, text):
    "It is the expression it prints, and prints the one it is"
    loss = make()
    assert type(loss) is Sum and repr(loss)==text
    again = eval(text.replace(f'0.1*{Q}', f'0.1*as_loss({Q})'), globals())
    assert repr(as_loss(again))==text
    given = dict(pred=torch.randn(4,3), teacher_pred=torch.randn(4,3), task_loss=torch.tensor(2.))
    for epoch in (0.,1.,2.5,9.):
        now = dict(given, epoch=epoch, pos=epoch/10)
        assert loss(**now)==as_loss(again)(**now)

@pytest.mark.parametrize('weight,want', [
    (ramp(4)*after(2), [0,0,.75,1]), (after(2)*ramp(4), [0,0,.75,1]), (2*ramp(4)/4, [.125,.25,.375,.5]),
    (ramp(4)*.5*steps({0:1, 1:3}), [.125,.75,1.125,1.5])], ids=str)
def test_weights_multiply(weight, want):
    assert type(weight) is Weight and [weight(e) for e in range(4)]==want

@pytest.mark.parametrize('wrong', [
    lambda: 'x'*SoftTarget, lambda: SoftTarget*None, lambda: True*SoftTarget(), lambda: SoftTarget()/ramp(2),
    lambda: ramp(2)/ramp(2), lambda: SoftTarget/'2', lambda: ramp(2)*'x', lambda: ramp(2)*fade,
    lambda: SoftTarget()*SoftTarget(),
    lambda: SoftTarget + 3, lambda: 3 + SoftTarget])
def test_what_does_not_weigh(wrong):
    with pytest.raises(TypeError): wrong()

def test_numbers_and_functions():
    "Python itself refuses a number times a function; what to write is said where a loss is expected"
    with pytest.raises(TypeError, match="'float' and 'function'"): .1*squares
    with pytest.raises(TypeError, match=r'\.1\*as_loss\(f\)'): as_loss(.1)
    with pytest.raises(ZeroDivisionError): SoftTarget()/0
    with pytest.raises(ValueError, match='finite'): SoftTarget*float('inf')

def test_a_class_that_needs_arguments():
    class Needs(DistillLoss):
        def __init__(self, net): self.net = net
        def forward(self, pred): return pred.sum()
    with pytest.raises(TypeError, match='net'): .1*Needs
    assert repr(.1*Needs(nn.ReLU()))=='0.1*Needs(ReLU)'

# ---- names ----

columns = dict(TaskLoss='task_loss', SoftTarget='soft_target', BinarySoftTarget='binary_soft_target', Logits='logits',
               Attention='attention', FitNet='fit_net', FCFD='fcfd', InfoNCE='info_nce', TAS='tas', OFA='ofa',
               OFALogits='ofa_logits')

def by_rule(name):
    "Snake case, letter by letter: a capital begins a word, unless it stands among capitals"
    res = ''
    for i,c in enumerate(name):
        begins = i and c.isupper() and (not name[i-1].isupper() or name[i+1:i+2].islower())
        res += '_'*bool(begins)+c.lower()
    return res

def test_names_of_columns():
    every = {**vars(losses), 'TaskLoss': TaskLoss}
    found = {n: o for n,o in every.items()
             if isinstance(o, type) and issubclass(o, DistillLoss) and o.__name__==n}      # and no second name of one
    assert columns.keys()<=found.keys()
    for name,cls in found.items():
        assert name_terms([cls()])==[columns.get(name, by_rule(name))]==[by_rule(name)]
    assert name_terms([SoftTarget(),as_loss(squares),SoftTarget(),Logits(),SoftTarget()])==[
        'soft_target','squares','soft_target_2','logits','soft_target_3']

# ---- what is seen from outside ----

class Learns(DistillLoss):
    "A part from the constructor, one from `build`, a buffer, a generator, a column"
    logs = ('scale',)
    def __init__(self):
        self.scale,self.draws,self.norm = nn.Parameter(torch.ones(1)),torch.Generator().manual_seed(0),nn.BatchNorm1d(3)
        self.register_buffer('seen', torch.zeros(()))
        self.register_buffer('unused', None)
    def build(self, pred): self.layer = nn.Linear(pred.shape[1], 3)
    def forward(self, pred):
        self.seen += 1
        self.log('scale', self.scale)
        noise = torch.randn(3, generator=self.draws)
        return (self.norm(self.layer(pred))*self.scale+noise).sum()

class Inner(DistillLoss):
    "Holds another loss"
    def __init__(self): self.inner = Learns()
    def build(self, pred): self.inner.build(pred=pred)
    def forward(self, pred): return self.inner(pred=pred)

def made(cls=Learns):
    torch.manual_seed(0)
    loss,pred = cls(),torch.randn(6,4)
    loss.build(pred=pred)
    return loss,pred

def test_built_and_named_layers():
    loss = Learns()
    assert loss.built is False and loss.named_layers is None
    loss.build(pred=torch.zeros(2,4))
    assert loss.built is True
    with pytest.raises(ValueError, match='make a new one for others'): loss.at('layer1')
    at = Learns().at(['a','b'], ['c','d'])
    assert at.named_layers==(['a','b'],['c','d']) and at.built is False
    assert Learns().at('a').named_layers==('a',None)

def test_terms():
    a,b = SoftTarget(),TaskLoss()
    assert a.terms()==[((),a)] and (weight := ramp(2)) is not None
    assert (.1*(weight*a)+b).terms()==[((.1,weight),a),((),b)]

def test_take_logged():
    loss,pred = made()
    assert loss.take_logged()=={}
    loss(pred=pred)
    loss.scale.data.mul_(2)
    loss(pred=pred)
    logged = loss.take_logged()
    assert list(logged)==['scale'] and logged['scale']==2 and not logged['scale'].requires_grad
    assert loss.take_logged()=={}
    loss(pred=pred)
    assert Learns().at('a').take_logged()=={} and deepcopy(loss).take_logged().keys()=={'scale'}

def test_generators():
    loss,_ = made(Inner)
    assert loss.generators()==[loss.inner.draws]
    fcfd = FCFD()
    assert (TaskLoss()+.1*fcfd+loss).generators()==[fcfd.draws,loss.inner.draws]

@pytest.mark.parametrize('wrap', [lambda l: l, lambda l: TaskLoss()+.1*l], ids=['alone','in a sum'])
@pytest.mark.parametrize('cls', [Learns,Inner])
def test_untouched(cls, wrap):
    loss,pred = made(cls)
    part = loss.inner if cls is Inner else loss
    part.norm.eval()                                              # modes may differ from module to module
    def state():
        return ({k: v.clone() for k,v in loss.state_dict().items()}, [m.training for m in loss.modules()],
                part.draws.get_state())
    was,buffers = state(),[id(b) for b in loss.buffers()]
    def same():
        now = state()
        assert all(torch.equal(now[0][k], v) for k,v in was[0].items())
        assert now[1]==was[1] and torch.equal(now[2], was[2])
        assert [id(b) for b in loss.buffers()]==buffers and part.take_logged()=={}
    with wrap(loss).untouched():
        assert not any(m.training for m in loss.modules())
        first = loss(pred=pred)
        part.seen = torch.tensor(9.)                              # a buffer that is replaced
        part.train()
    same()
    with wrap(loss).untouched(): assert loss(pred=pred)==first    # the same draws, the same averages
    same()
    with pytest.raises(RuntimeError, match='in the middle'):
        with wrap(loss).untouched():
            loss(pred=pred)
            raise RuntimeError('in the middle')
    same()

# ---- with whom it learned ----

def nets(n=3): return [nn.Linear(2,2) for _ in range(n)]

@pytest.mark.parametrize('built_first', [True,False])
def test_begin(built_first):
    (student,other,teacher),(loss,pred) = nets(),made()
    if not built_first:                                           # networks known before the parts are there
        loss = Learns()
        loss.begin(student, teacher)
        loss.build(pred=pred)
    for _ in range(2): loss.begin(student, teacher)
    with pytest.raises(ValueError, match=r'Learns\(\) has learned parts that were trained with another student'):
        loss.begin(other, teacher)
    with pytest.raises(ValueError, match='another teacher: make a new loss'): loss.begin(student, other)
    with pytest.raises(ValueError, match='another teacher'): loss.begin(student)
    loss.begin(student, teacher)                                  # a refusal changes nothing

def test_begin_without_parameters():
    student,other,teacher = nets()
    loss = SoftTarget()
    for given in ((student,teacher),(other,teacher),(other,None),(student,)): loss.begin(*given)

def test_begin_of_a_sum():
    (student,other,teacher),(loss,_) = nets(),made()
    total = TaskLoss()+.1*loss+SoftTarget()
    total.begin(student, teacher)
    with pytest.raises(ValueError, match='another student'): loss.begin(other, teacher)
    with pytest.raises(ValueError, match='another student'): total.begin(other, teacher)

def test_networks_are_held_weakly():
    (student,other,teacher),(loss,_) = nets(),made()
    loss.begin(student, teacher)
    gone = weakref.ref(student)
    del student
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match='another student'): loss.begin(other, teacher)

def test_copies_begin_anew():
    "A copy, and a loss from a file, may learn with other networks"
    (student,other,teacher),(loss,pred) = nets(),made()
    for o in (SoftTarget(),TaskLoss()+Logits()): pickle.loads(pickle.dumps(o)).begin(other, teacher)
    loss.begin(student, teacher)
    twin = deepcopy(loss)
    twin.begin(other, teacher)
    assert twin.built and twin(pred=pred).isfinite()
    with pytest.raises(ValueError, match='another student'): twin.begin(student, teacher)

# ---- pairs of maps ----

class Pair(FeatureLoss):
    def pair(self, s, t): return (s-t).pow(2).mean()
class ByMethod(Pair):
    def adapter(self, s, t, xb=None): return nn.Linear(s.shape[1], t.shape[1])
def linear(s, t): return nn.Linear(s.shape[1], t.shape[1])
class ByFunction(Pair): adapter = linear
class ByStatic(Pair): adapter = staticmethod(linear)
class ByConstructor(Pair):
    def __init__(self, adapter=linear): self.adapter = adapter

@pytest.mark.parametrize('cls', [ByMethod,ByFunction,ByStatic,ByConstructor])
def test_where_an_adapter_may_come_from(cls):
    fm_s,fm_t = dict(a=torch.randn(3,4), b=torch.randn(3,5)),dict(a=torch.randn(3,2), b=torch.randn(3,6))
    loss = cls()
    assert len(loss.adapters)==0 and list(loss.parameters())==[]
    with pytest.raises(RuntimeError, match='needs build'): loss(fm_s=fm_s, fm_t=fm_t)
    loss.build(fm_s=fm_s, fm_t=fm_t)
    assert [(m.in_features,m.out_features) for m in loss.adapters]==[(4,2),(5,6)]
    want = sum((m(s)-t).pow(2).mean() for m,s,t in zip(loss.adapters, fm_s.values(), fm_t.values(), strict=True))
    assert loss(fm_s=fm_s, fm_t=fm_t)==want
    assert cls is not ByConstructor or ByConstructor(None)(fm_s=fm_s, fm_t=fm_s)==0

def test_a_plain_function_is_one_loss():
    loss = as_loss(squares)
    assert type(loss) is Function
    assert loss.reads==dict(pred=True, teacher_pred=True, fm_s=False, fm_t=False, target=False)

# ---- layers read besides, networks inside ----

class Beside(DistillLoss):
    "Reads what it is told, and the embedding"
    layers,also = 'stages',('embedding',)
    def forward(self, fm_s): return sum(z.mean() for z in fm_s.values())

@pytest.mark.parametrize('also', ['embedding', ('embedding',), ['embedding'], dict(student='embedding')])
def test_also_is_what_at_does_not_replace(also):
    loss = Beside().at(['layer2','layer3'])
    loss.also = also
    assert loss.beside('student')==('embedding',)
    assert loss.beside('teacher')==()
    fm = dict(layer2=1, layer3=2, embedding=3)
    assert loss.declared(fm)==dict(layer2=1, layer3=2)
    assert loss.declared(fm, 'teacher')==fm
    assert repr(loss)=="Beside().at(['layer2', 'layer3'])"

@pytest.mark.parametrize('also', [3, ('a',3), dict(peer='a'), dict(student=[3])])
def test_also_names_layers(also):
    with pytest.raises(TypeError, match=r'Odd.also is .*expected names of layers of the student'):
        type('Odd', (DistillLoss,), dict(also=also))

class Pairs(FeatureLoss):
    "Of each pair the difference of the means"
    also = dict(teacher=('a','b'))
    def pair(self, s, t): return s.mean()-t.mean()

def test_pairs_are_not_made_of_what_is_read_besides():
    fm_s,fm_t = {'x': torch.tensor(5.)},{'y': torch.tensor(3.), 'a': torch.tensor(1.), 'b': torch.tensor(1.)}
    assert Pairs()(fm_s=fm_s, fm_t=fm_t)==2
    with pytest.raises(ValueError, match=r'pairs 1 layers .* with 2 of the teacher \[.y., .z.\]'):
        Pairs()(fm_s=fm_s, fm_t={'y': torch.tensor(3.), 'z': torch.tensor(1.), **fm_t})

class Taught(DistillLoss):
    def __init__(self, nets, more=None): self.nets,self.more = nn.ModuleList(nets),more
    def forward(self, xb): return self.nets[0](*xb).mean()

def test_networks_inside_are_words_and_are_shared():
    "However they are handed over, in what is printed and in the copies that `at` makes"
    nets,more = [nn.Linear(2,2),nn.ReLU()],{'a': (nn.Tanh(),), 'b': 1}
    loss = Taught(nets, more)
    assert repr(loss)=="Taught([Linear, ReLU], {'a': (Tanh,), 'b': 1})"
    copied = loss.at('0')
    assert copied.nets is not loss.nets
    assert [*copied.nets]==nets
    assert copied.more['a'][0] is more['a'][0]
    assert repr(copied)=="Taught([Linear, ReLU], {'a': (Tanh,), 'b': 1}).at('0')"
