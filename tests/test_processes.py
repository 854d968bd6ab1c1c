"Two processes with half a batch each train what one does with all of it; as a script, this is what each of them runs"
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import KD,X,Y,floating,furthest,get_dls,left,learner,net,seed,state
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.learner import Learner,load_learner
from fastai.torch_core import rank_distrib
from fastcore.basics import noop
from torch import nn

from fasterdistill.loss import DistillLoss,FeatureLoss,TaskLoss,steps
from fasterdistill.losses.cc import CC
from fasterdistill.losses.crd import CRD
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.losses.pkt import PKT
from fasterdistill.losses.rkd import RKD
from fasterdistill.losses.sp import SP
from fasterdistill.task import gather

pytest.importorskip('accelerate', reason='several processes are started through Hugging Face Accelerate')
root = Path(__file__).parents[1]
made,seen = [],[]             # first weights of adapters; what a loss read

def conv(s, t, xb=None):
    "Without BatchNorm, whose averages are those of half a batch; other first weights in each process"
    torch.manual_seed(7+rank_distrib())
    res = nn.Conv2d(s.shape[1], t.shape[1], 1)
    made.append(res.weight.detach().clone())
    return res

class Deeper(FeatureLoss):
    "Several pairs with a part each"
    adapter = conv
    def pair(self, s, t, i, n): return (i+1)/n*F.mse_loss(s, t)

class Rare(DistillLoss):
    "A learned part for the items of a class, which a batch may not have: then it gets no gradient"
    def __init__(self, c): self.c = c
    def build(self, pred): self.scale = nn.Parameter(torch.ones(pred.shape[1])+.1*rank_distrib())
    def forward(self, pred, teacher_pred, target):
        i = target==self.c
        if torch.is_grad_enabled(): seen.append(int(i.sum()))
        return (pred*self.scale-teacher_pred)[i].pow(2).sum()/len(pred) if i.any() else 0*pred.sum()

def own_rows(n, gathered):
    "Where a process's own `n` rows are among all"
    return torch.arange(n)+(rank_distrib()*n if gathered else 0)

class InBatch(DistillLoss):
    "Find the own item among all of the teacher's, and the other way round"
    layers = 'last'
    def __init__(self, over=gather): self.over = over
    def build(self, fm_s, fm_t): self.proj = conv(*fm_s.values(), *fm_t.values())
    def forward(self, fm_s, fm_t):
        s,t = [F.normalize(z.mean((2,3))) for z in (self.proj(*fm_s.values()),*fm_t.values())]
        mine = own_rows(len(s), self.over is gather)
        return sum(F.cross_entropy(a@self.over(b).T/.1, mine) for a,b in ((s,t),(t,s)))

class Alike(DistillLoss):
    "All items of all processes, compared with each other in every process"
    layers = 'last'
    def build(self, fm_s, fm_t): self.proj = conv(*fm_s.values(), *fm_t.values())
    def forward(self, fm_s, fm_t):
        pooled = [gather(z.mean((2,3))) for z in (self.proj(*fm_s.values()),*fm_t.values())]
        s,t = [torch.cdist(o, o) for o in pooled]
        return (s-t).pow(2).mean()

class Which(DistillLoss):
    "Notes which items it is told of, and shows those to a part it learns for each item"
    def build(self, n_items): self.each = nn.Parameter(torch.zeros(n_items)+rank_distrib())
    def forward(self, pred, idx, target, xb):
        if torch.is_grad_enabled(): seen.append((idx,target,xb[0].clone()))
        return (self.each[idx]*pred.logsumexp(1)).mean()

class Unlike(InfoNCE):
    "With other first weights and another temperature in each process"
    def build(self, fm_s, fm_t, xb=None):
        torch.manual_seed(7+rank_distrib())
        super().build(fm_s, fm_t, xb)
        if self.learn_tau: self.log_tau.data += .1*rank_distrib()
        made.append(self.project[0].weight.detach().clone())

def accumulate(n): return [GradientAccumulation(64//n)]
def clip(n): return [GradientClip(.05)]
def both(n): return accumulate(n)+clip(n)
def first(n): return [SaveModelCallback(comp=lambda now, best: np.isinf(best), with_opt=True)]     # of the epochs

cases = dict(                                                  # loss, and callbacks for n processes
    soft_target  = (SoftTarget, None),
    fitnet       = (lambda: TaskLoss()+FitNet(conv), None),
    deeper       = (lambda: .5*TaskLoss()+Deeper(), None),
    fcfd         = (lambda: TaskLoss()+FCFD(adapter=conv), None),
    accumulation = (lambda: TaskLoss()+FitNet(conv), accumulate),
    clip         = (lambda: TaskLoss()+10*FitNet(conv), clip),
    later        = (lambda: TaskLoss()+steps({0:0, 1:1})*FitNet(conv), None),
    rare         = (lambda: TaskLoss()+Rare(9), None),
    rarer        = (lambda: TaskLoss()+Rare(8), None),
    twice        = (lambda: TaskLoss()+FitNet(conv), None),
    saved        = (lambda: TaskLoss()+FitNet(conv), first),
    which        = (lambda: TaskLoss()+.1*Which(), None),
    in_batch     = (lambda: TaskLoss()+InBatch(), None),
    alike        = (lambda: TaskLoss()+100*Alike(), None),
    rkd          = (lambda: TaskLoss()+RKD(), None),
    sp           = (lambda: TaskLoss()+300*SP(), None),
    pkt          = (lambda: TaskLoss()+3000*PKT(), None),
    cc           = (lambda: TaskLoss()+100*CC('paper'), None),
    crd          = (lambda: TaskLoss()+.8*CRD(width=16), None),
    infonce      = (lambda: TaskLoss()+Unlike(), None),
    infonce_raw  = (lambda: TaskLoss()+Unlike(tau=.01, normalize=False, symmetric=True), None),
    infonce_all  = (lambda: TaskLoss()+Unlike(symmetric=True, mask_same_class=True, learn_tau=True), None),
    alone        = (lambda: TaskLoss()+InBatch(noop), None))
more = {f'{loss}_{name}': (cases[loss][0],cbs) for loss in ('deeper','fcfd','rare','in_batch')
        for name,cbs in dict(accumulation=accumulate, clip=clip, both=both).items()}
learned_nothing = 'soft_target','rkd','sp','pkt','cc'

def shared_batches(n):
    "Loaders for one of `n` processes: batch by batch, all together see the same items for any `n`"
    dls,gen = get_dls(bs=32//n),torch.Generator().manual_seed(5)
    def shuffle(idxs):                                         # fastai gives each process a block of the epoch's items
        return torch.randperm(96, generator=gen).view(3, n, -1).transpose(0, 1).flatten().tolist()
    dls.train.shuffle_fn = shuffle
    return dls

def run(name, n=1, out=None):
    "One fit of two epochs, in float64, in this process, which is one of `n`"
    made.clear()
    seen.clear()
    loss,cbs = (cases|more)[name]
    with floating(torch.float64):
        teacher = net(8, bn='fcfd' not in name, s=1)           # FCFD runs the teacher with the averages of the batch
        kd = KD(teacher, loss())
        learn = learner(net(bn=False), shared_batches(n), cbs=kd)
        seed(3+rank_distrib())
        def fit():
            for epochs in ([1,1] if name=='twice' else [2]): learn.fit(epochs, cbs=cbs(n) if cbs else None)
        if n==1: fit()
        else:
            with learn.distrib_ctx(cpu=True, sync_bn=False): fit()
    if out and name=='fitnet': learn.export(out/'student.pkl')
    return dict(
        model=state(learn.model), learned=state(kd.loss), made=list(made), seen=list(seen), history=kd.history,
        losses=torch.stack(learn.recorder.losses), left=left(learn, teacher), type=type(learn.model))

def direct(r):
    "What `gather` does with tensors whose sums can be done by hand"
    z = (torch.arange(6.).view(3, 2)+10*r).requires_grad_()
    g = gather(z)
    (g*torch.arange(12.).view(6, 2)*(r+1)).sum().backward()
    x = (torch.arange(16.).view(1, 2, 2, 4)+100*r).contiguous(memory_format=torch.channels_last)
    res = dict(rows=g.detach(), grad=z.grad, ints=gather(torch.tensor([r,5])), flags=gather(torch.tensor([r==0])),
               maps=gather(x))
    with torch.no_grad(): res['plain'] = gather(z).requires_grad
    for what,o in dict(rows=torch.zeros(2+r, 3), number=torch.tensor(1.)).items():
        try: gather(o)
        except ValueError as e: res[f'refused {what}'] = str(e)
    return res

def _broadcast(self, t, rank):
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

def main(out, *names):
    from fastai.distributed import DistributedDL
    DistributedDL._broadcast = _broadcast                       # fastai's own goes by way of a GPU
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))
    r = dist.get_rank()
    for name in names:
        res = direct(r) if name=='direct' else run(name, dist.get_world_size(), out)
        torch.save(res, out/f'{name}_{r}.pth')
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)                # Python's own way out has aborted, when threads of gloo still wanted the interpreter

def start(*cmd, cwd, timeout=300):
    "What `python cmd` prints, or an error with it: a hang is one too"
    paths = [*filter(None, [os.environ.get('PYTHONPATH')]),str(root)]
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore', 'PYTHONPATH':os.pathsep.join(paths)}
    p = subprocess.Popen([sys.executable,*map(str, cmd)], cwd=cwd, env=env, start_new_session=True, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try: text,err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        pytest.fail(f'{cmd} did not end within {timeout} s: {"".join(p.communicate())[-8000:]}')
    assert p.returncode==0, (text+err)[-8000:]
    return text

torchrun = '-m','torch.distributed.run','--standalone','--nproc_per_node','2'

def two(folder, names):
    "What each of two processes made of these cases"
    start(*torchrun, __file__, folder, *names, cwd=folder)
    return {name: [torch.load(folder/f'{name}_{r}.pth', weights_only=False) for r in (0,1)] for name in names}

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('processes')
@pytest.fixture(scope='module')
def done(folder): return two(folder, ['direct',*cases])
@pytest.fixture(scope='module')
def done_more(folder): return two(folder, more)

def check(name, a, b):
    "Two processes, clean and equal to the last bit, and one process: the same to 1e-10"
    one = run(name)
    for r in (a,b):
        assert r['left']==[]
        assert r['type'] is nn.Sequential
    assert furthest(a['model'], b['model'])==furthest(a['learned'], b['learned'])==0.
    assert bool(a['learned'])==(name not in learned_nothing)
    assert furthest(a['learned'], one['learned'])<1e-10
    assert furthest(a['model'], one['model'])<1e-10
    with floating(torch.float64): assert furthest(one['model'], state(net(bn=False)))>1e-3
    for x,y,z in zip(a['made'], b['made'], one['made'], strict=True):
        assert torch.equal(x, z)
        assert not torch.equal(x, y)                           # they were made unlike
    for r in (a,b):                                            # fastai's losses are those of all processes
        torch.testing.assert_close(r['losses'], one['losses'], rtol=0, atol=1e-10)
    for h,g,o in zip(a['history'], b['history'], one['history'], strict=True):
        if 'task_loss' in o:                                   # columns are each process's own
            assert abs((h['task_loss']+g['task_loss'])/2-o['task_loss'])<1e-6
    return one

@pytest.mark.parametrize('name', [n for n in cases if n!='alone'])
def test_two_as_one(done, name): check(name, *done[name])

@pytest.mark.slow
@pytest.mark.parametrize('name', more)
def test_two_as_one_with(done_more, name): check(name, *done_more[name])

def test_the_first_epoch_is_brought_back(done):
    "In each process, of the student and of what was learned: neither is what two epochs make of it"
    for o in ('model','learned'): assert furthest(done['saved'][1][o], done['fitnet'][1][o])>1e-3

def test_without_gather(done):
    "What the comparison above would miss: in halves of a batch there are fewer to choose from"
    a,b = done['alone']
    assert furthest(a['model'], b['model'])==furthest(a['learned'], b['learned'])==0.
    assert furthest(a['model'], run('alone')['model'])>1e-3

def test_part_without_gradient_in_one_process(done):
    "On the first batch, where there is none yet, and later; and in both"
    rare,rarer = ([*zip(*(r['seen'] for r in done[k]), strict=True)] for k in ('rare','rarer'))
    assert rare[0]==(0,3)
    assert rare[-1]==(2,0)
    assert rarer[0]==(0,0)

def test_idx(done):
    "Numbers of the training set: in each process those of its own items, in both together those of the batch"
    one,(a,b) = run('which')['seen'],[r['seen'] for r in done['which']]
    for i,t,x in (*a,*b):
        assert len(i)==16
        assert torch.equal(Y[i], t)
        assert torch.equal(X[i].double(), x.as_subclass(torch.Tensor))
    for (i,*_),(j,*_),(both,*_) in zip(a, b, one, strict=True): assert i.tolist()+j.tolist()==both.tolist()
    assert len(one)==6
    assert sorted(i for o in one[:3] for i in o[0].tolist())==list(range(96))

def test_export(done, folder):
    "The process of rank 0 writes the student, plain and without the teacher"
    learn = load_learner(folder/'student.pkl')
    assert isinstance(learn, Learner)
    assert furthest(state(learn.model), done['fitnet'][0]['model'])==0.
    assert left(learn)==[]
    assert not any(type(cb).__module__.startswith('fasterdistill') for cb in learn.cbs)

def test_gather(done):
    rows = torch.tensor([[0,1],[2,3],[4,5],[10,11],[12,13],[14,15]]).float()
    grads = 3*torch.arange(12.).view(2, 3, 2)                  # once what rank 0 made of it, twice what rank 1 did
    maps = torch.cat([torch.arange(16.).view(1, 2, 2, 4)+100*r for r in (0,1)])
    for r,o in enumerate(done['direct']):
        assert torch.equal(o['rows'], rows)
        assert torch.equal(o['grad'], grads[r])
        assert torch.equal(o['maps'], maps)
        assert o['ints'].tolist()==[0,5,1,5]
        assert o['flags'].tolist()==[True,False]
        assert o['plain'] is False
        assert o['refused rows']=='gather needs as many rows in each process, here they have 2, 3'
        assert 'expected rows (B,…)' in o['refused number']

def test_gather_in_one_process(tmp_path):
    z = torch.randn(3, 2)
    assert gather(z) is z
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try: assert gather(z) is z
    finally: dist.destroy_process_group()

def accuracies(text): return [float(o.split()[1].strip('%')) for o in text.splitlines()[:2]]

@pytest.mark.slow
def test_example(tmp_path):
    "As its first lines say; the teacher is good, the student learns, and all processes have the same one"
    script = root/'examples'/'several_processes.py'
    two,one = start(*torchrun, script, cwd=tmp_path),start(script, cwd=tmp_path)
    for n,text in ((2,two),(1,one)):
        assert len(text.splitlines())==3
        assert f'in {n} process(es)' in text
        assert min(accuracies(text))>85
    assert two.splitlines()[-1].endswith('difference between processes 0')

if __name__=='__main__': main(Path(sys.argv[1]), *sys.argv[2:])
