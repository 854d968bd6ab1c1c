"""The numbers of the losses: those of `vectors/` (the authors' codes), and formulas written again in numpy.
A new loss adds its rows to `refs`, and its formula to `formulas` with the instances to try to `derived`: every test
then runs on it."""
import re
from functools import partial
from itertools import product
from math import factorial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import KD,floating,learner,tuples
from fastai.callback.core import Callback
from fastai.losses import (BCEWithLogitsLossFlat,CrossEntropyLossFlat,FocalLossFlat,LabelSmoothingCrossEntropy,
                           MSELossFlat)
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.ab import AB
from fasterdistill.losses.adjusted import AdjustedSoftTarget
from fasterdistill.losses.answers import HardTarget,Mutual
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.cc import CC
from fasterdistill.losses.consistency import CSKD,softened_kl
from fasterdistill.losses.dist import DIST
from fasterdistill.losses.dkd import DKD
from fasterdistill.losses.embedding import SRD,Cosine
from fasterdistill.losses.fitnet import FitNet,hint,pointwise
from fasterdistill.losses.fsp import FSP,fsp_matrix
from fasterdistill.losses.gradient_attention import GradientAttention,input_gradient
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.losses.logits import BinarySoftTarget,Logits,SoftTarget
from fasterdistill.losses.nkd import NKD
from fasterdistill.losses.nst import NST
from fasterdistill.losses.ofa import OFALogits
from fasterdistill.losses.ofd import OFD,bn_margin
from fasterdistill.losses.pkt import PKT
from fasterdistill.losses.reviewkd import HCL,ReviewKD
from fasterdistill.losses.rkd import RKD
from fasterdistill.losses.rld import RLD
from fasterdistill.losses.sad import SAD,position_shares
from fasterdistill.losses.sp import SP
from fasterdistill.losses.uskd import USKD
from fasterdistill.losses.vid import VID
from fasterdistill.losses.wkd import WKD
from fasterdistill.losses.wsl import WSL
from fasterdistill.losses.wttm import WTTM
from fasterdistill.networks.net import Net

folder = Path(__file__).parent/'vectors'
dtypes = [torch.float64,torch.float32]
value_tol,grad_tol = {torch.float64:1e-9, torch.float32:2e-5},{torch.float64:1e-6, torch.float32:1e-4}

# ---- calling a loss on arrays ----

student_side = 'pred','fm_s'

def each_array(given, f):
    "What is given, with `f(name, array)` in the place of each array, which may be in a dict or tuple"
    def one(n, o):
        if isinstance(o, dict): return {k: one(n, a) for k,a in o.items()}
        if isinstance(o, tuple): return tuple(one(n, a) for a in o)
        return f(n, o) if isinstance(o, np.ndarray) else o
    return {n: one(n, o) for n,o in given.items()}

def tensors(given, dtype):
    "Arrays as tensors; those of the student require a gradient"
    def one(n, o):
        if o.dtype.kind!='f': return torch.tensor(o)
        return torch.tensor(o, dtype=dtype).requires_grad_(n in student_side)
    return each_array(given, one)

def leaves(given):
    "What the student has, by name and key"
    res = {}
    for n in student_side:
        o = given.get(n)
        if o is not None: res |= {(n,k): a for k,a in o.items()} if isinstance(o, dict) else {(n,None): o}
    return res

def set_parts(loss, given, dtype, par):
    "The loss's learned parts are built, and have these weights"
    read = {n: given[n] for n in loss.build_reads if n in given}
    loss.build(**{n: {k: z.detach() for k,z in o.items()} if isinstance(o, dict) else o for n,o in read.items()})
    loss.to(dtype)
    with torch.no_grad():
        for n,p in loss.named_parameters(): p.copy_(torch.from_numpy(par[n]).view_as(p))

def call(loss, given, dtype, par=None):
    "Value, gradients of the student's inputs and of the learned parts; where `par` sets parts they are built first"
    g = tensors(given, dtype)
    if par: set_parts(loss, g, dtype, par)
    v = loss(**g)
    assert v.shape==()
    assert v.dtype==dtype
    wanted = leaves(g)|dict(loss.named_parameters())
    grads = torch.autograd.grad(v, [*wanted.values()])
    return v.item(),dict(zip(wanted, [o.double().numpy() for o in grads]))

def close(got, want, tol): np.testing.assert_allclose(got, want, rtol=tol, atol=0)
def close_grad(got, want, tol):
    assert got.shape==want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tol*np.abs(want).max())

# ---- vectors: which call gives which number ----

class Ref:
    """Rows of a vector file: `make(v, i)` makes the loss of row `i`, `given(v)` its inputs, `out` names the values and
    `grads` says where each gradient is, by input `('fm_s','a')`, `('pred',None)` or learned parameter, `par` where the
    learned parts are"""
    def __init__(self, file, make, given, out, grads=None, case='', par=None, id=None):
        self.file,self.make,self.given,self.out,self.case = file,make,given,out,case
        self.grads,self.par,self.id = grads or {},par or {},id or file
    @property
    def vectors(self):
        with np.load(folder/f'{self.file}.npz') as d:
            shared = {k: d[k] for k in d if '__' not in k}                       # by all cases, as weights are
            return shared | {k.removeprefix(self.case): d[k] for k in d if k.startswith(self.case)}
    def rows(self):
        "Loss, what it is given, the value, the gradients and the learned parts"
        v = self.vectors
        many = v[self.out].ndim
        par = {k: v[o] for k,o in self.par.items()}
        for i in range(len(v[self.out]) if many else 1):
            def at(k): return v[k][i] if many else v[k]
            yield self.make(v, i),self.given(v),at(self.out),{k: at(o) for k,o in self.grads.items()},par

def logits(v): return dict(pred=v['in_zs'], teacher_pred=v['in_zt'])
def labelled(v): return dict(logits(v), target=v['in_y'])
def with_task(v): return dict(logits(v), task_loss=cross_entropy(v))
def segmentation(v): return dict(pred=v['in_logits_student'], teacher_pred=v['in_logits_selfteacher'])
def maps(v): return dict(fm_s=dict(a=v['in_fs']), fm_t=dict(a=v['in_ft']))
def embedded(v): return dict(fm_s=dict(a=v['in_embed_s']), fm_t=dict(a=v['in_embed_t']))
def swapped(v): return dict(fm_s=dict(a=v['in_ft']), fm_t=dict(a=v['in_fs']))
def map_and_tokens(v): return dict(fm_s=dict(a=v['in_student_map']), fm_t=dict(a=v['in_teacher_tokens']))
def cross_entropy(v):
    z = v['in_zs'].astype(float)
    log_p = z-np.log(np.exp(z).sum(1, keepdims=True))
    return np.array(-log_p[np.arange(8),v['in_y']].mean())

def T(v, i): return float(v['par_T'][i])
def tau(v, i): return float(v['par_tau'][i])
def gamma(v, i): return float(v['par_gamma'][i])
def row(v, i, which, *names):
    "Parameters that are the columns of one array"
    return dict(zip(names, v[f'par_{which}'][i].tolist(), strict=True))

ordinary,pred,fm = 'ordinary__',('pred',None),('fm_s','a')
of_zs,of_fs = {pred:'grad_zs'},{fm:'grad_fs'}

logit_refs = [
    Ref('kd_soft_target', lambda v,i: SoftTarget(T=T(v,i)), logits, 'out_kl_T2', of_zs, ordinary),
    Ref('kd_soft_target', lambda v,i: .1*TaskLoss()+.9*SoftTarget(T=T(v,i)), with_task, 'out_hinton_alpha09',
        case=ordinary, id='kd_soft_target-sum'),
    Ref('kd_soft_target', lambda v,i: .5*TaskLoss()+.5*SoftTarget(T=5), with_task, 'out_fasterai_lerp_w05_T5',
        case=ordinary, id='kd_soft_target-fasterai'),
    Ref('logit_standardization', lambda v,i: SoftTarget(T=T(v,i), standardize=True), logits, 'out_kl_T2', of_zs,
        ordinary),
    Ref('frskd_segmentation_kl', lambda v,i: SoftTarget(T=float(v['par_T'])), segmentation, 'out_kd_pixel_mean',
        {pred:'grad_logits_student_kd'}),
    Ref('logits_mse', lambda v,i: Logits(), logits, 'out_mse', of_zs, ordinary)]

def dkd(v, i, **kwargs): return DKD(**row(v, i, 'alpha_beta_T', 'alpha', 'beta', 'T'), **kwargs)
logit_refs += [
    Ref('dkd', dkd, labelled, 'out_dkd', of_zs, ordinary),
    Ref('logit_standardization', partial(dkd, standardize=True), labelled, 'out_dkd', {pred:'grad_zs_dkd'}, ordinary,
        id='logit_standardization-dkd'),
    Ref('rld', lambda v,i: RLD(**row(v, i, 'alpha_beta_T_alphaT', 'alpha', 'beta', 'T', 'alpha_T')), labelled,
        'out_rld', of_zs, ordinary),
    *[Ref('wttm', lambda v,i,weighted=weighted: WTTM(gamma=gamma(v,i), weighted=weighted), logits, f'out_{name}',
          {pred:f'grad_zs_{name}'}, ordinary, id=name) for name,weighted in dict(wttm=True, ttm=False).items()],
    *[Ref('wsl', lambda v,i: WSL(T=T(v,i)), labelled, 'out_wsl', of_zs, f'{case}__', id=f'wsl-{case}')
      for case in ('ordinary','extreme')],
    Ref('nkd', lambda v,i: NKD(**row(v, i, 'gamma_T', 'gamma', 'T')), labelled, 'out_nkd', of_zs, ordinary),
    Ref('dist', lambda v,i: DIST(**row(v, i, 'beta_gamma_tau', 'beta', 'gamma', 'tau')), logits, 'out_dist', of_zs,
        ordinary),
]

def adjusted_ref(name, case, **kwargs):
    return Ref('adjusted_soft_target', lambda v,i: AdjustedSoftTarget(T=4, **kwargs), labelled, f'out_{name}',
               {pred:f'grad_zs_{name}'}, f'{case}__', id=f'adjusted-{name}-{case}')

adjusted = dict(
    swap_T4=dict(adjust='swap'), smooth_T4_eps01=dict(adjust='smooth', eps=.1),
    flsw_T4_beta2_gamma2=dict(adjust=None, dynamic='flsw', beta=2, gamma=2),
    cwsm_T4_beta05=dict(adjust=None, dynamic='cwsm', beta=.5),
    swap_flsw_T4_beta2_gamma2=dict(adjust='swap', dynamic='flsw', beta=2, gamma=2))
logit_refs += [adjusted_ref(name, case, **kwargs)
               for case in ('ordinary','extreme') for name,kwargs in adjusted.items()]

def attention_ref(map, p, form):
    differentiated = form=='code' and (map,p) in (('sum',1),('sum',2),('max',2))
    grads = {fm:f'grad_fs_{map}_p{p}_code'} if differentiated else {}
    return Ref('at_activation', lambda v,i: Attention(p=p, map=map, form=form), maps, f'out_{map}_p{p}_{form}', grads,
               'equal__', id=f'at_activation-{map}-p{p}-{form}')

def ofa_ref(name, **kwargs):
    return Ref('ofa', lambda v,i: OFALogits(gamma=gamma(v,i), **kwargs), labelled, f'out_{name}', {pred:f'grad_{name}'},
               ordinary, id=f'ofa-{name}')

def infonce_ref(name, given=maps, **kwargs):
    grads = {fm:f'grad_fs_{name}'} if name.endswith('s2t') else {}
    return Ref('infonce', lambda v,i: InfoNCE(tau=tau(v,i), **kwargs), given, f'out_{name}', grads, 'vectors__',
               id=f'infonce-{name}')

def pairs_of_maps(n, student='in_student_{i}', teacher='in_teacher_{i}'):
    "The first `n` maps of both networks"
    def given(v):
        sides = dict(fm_s=student, fm_t=teacher)
        return {side: {f'{i}': v[key.format(i=i)] for i in range(n)} for side,key in sides.items()}
    return given
def grads_of_maps(n, key='grad_student_{i}'): return {('fm_s',f'{i}'): key.format(i=i) for i in range(n)}

vid_par = {'adapters.0.log_scale':'par_log_scale'}
vid_par |= {f'adapters.0.mean.{2*i}.weight':f'par_conv1x1_{i}' for i in range(3)}

three = pairs_of_maps(3, 'in_fs_{i}', 'in_ft_{i}')
def grads_of(parts, n, key='grad_fs_{i}'):
    return grads_of_maps(n, key) | {k: v.replace('par_', 'grad_') for k,v in parts.items()}
connectors = {f'adapters.{i}.{part}':f'par_connector{i}_{part.replace(".", "_")}'
              for i in range(3) for part in ('conv.weight','bn.weight','bn.bias')}
def margins(v): return [v[f'out_margin_{i}'] for i in range(3)]
def teachers_margins():
    with np.load(folder/'ofd.npz') as d: return margins(d)

levels = pairs_of_maps(4)
fusions = {f'fusions.{i}.{part}':f'par_abf{i}_{part.replace(".", "_")}' for i in range(4) for part in (
    'conv1.weight','bn1.weight','bn1.bias','conv2.weight','bn2.weight','bn2.bias',
    *([] if i==3 else ['att.weight','att.bias']))}
embed = {f'adapters.0.linear.{o}':f'par_embed_{o}' for o in ('weight','bias')}
def of_row(loss, v, i): return loss(grid=int(v['par_grid'][i]), ratio=float(v['par_ratio'][i]), adapter=None)
def means(v, i):
    grid = int(v['par_grid'][i])
    return WKD(grid=grid, ratio=1., adapter=None) + -1*WKD(grid=grid, ratio=0., adapter=None)

feature_refs = [
    Ref('cosine_penultimate', lambda v,i: Cosine(adapter=None), maps, 'out_one_minus_cos_mean', of_fs),
    Ref('srd', lambda v,i: SRD(alpha=float(v['par_exponent'])), maps, 'out_srd',
        of_fs|{'adapters.0.linear.weight':'grad_embed_weight'}, par=embed),
    Ref('wkd', lambda v,i: of_row(WKD, v, i), maps, 'out_wkd', of_fs),
    Ref('wkd', lambda v,i: WKD(grid=int(v['par_grid'][i]), ratio=0., adapter=None), maps, 'out_std', id='wkd-std'),
    Ref('wkd', means, maps, 'out_mean', id='wkd-mean'),
    *[Ref('reviewkd', lambda v,i: HCL(), maps, 'out_hcl', of_fs, f'hcl{n}__', id=f'reviewkd-hcl{n}')
      for n in (8,4,2,1)],
    Ref('reviewkd', lambda v,i: ReviewKD(mid=int(v['par_mid_channels'])), levels, 'out_total',
        grads_of(fusions, 4, 'grad_student_{i}'), par=fusions),
    Ref('ab', lambda v,i: AB(margin=float(v['par_margin'][i]), adapter=None), three, 'out_ab', case='plain__'),
    Ref('ab', lambda v,i: AB(), three, 'out_ab', grads_of(connectors, 3), 'connector__', connectors, id='ab-connector'),
    Ref('ofd', lambda v,i: OFD(margins=teachers_margins(), adapter=None), three, 'out_ofd', grads_of({}, 3), 'plain__'),
    Ref('ofd', lambda v,i: OFD(margins=teachers_margins()), three, 'out_ofd', grads_of(connectors, 3), 'connector__',
        connectors, id='ofd-connector'),
    Ref('nst', lambda v,i: NST(), maps, 'out_nst', of_fs, 'equal__'),
    Ref('fsp', lambda v,i: FSP(), pairs_of_maps(2), 'out_total_code', grads_of_maps(2)),
    Ref('fsp', lambda v,i: FSP(), pairs_of_maps(2), 'out_loss_per_pair_code', id='fsp-pair'),
    Ref('fsp', lambda v,i: FSP(form='paper'), pairs_of_maps(2), 'out_loss_per_pair_paper', id='fsp-paper'),
    Ref('vid', lambda v,i: VID(eps=float(v['par_eps'])), maps, 'out_vid',
        of_fs|{'adapters.0.log_scale':'grad_log_scale'}, par=vid_par)]

def neighbours(v): return dict(fm_s=dict(lower=v['in_lower'], deeper=v['in_deeper']))
def sad_refs(case):
    grads = {('fm_s','lower'):'grad_lower_mse_mean'}
    moved = grads|{('fm_s','deeper'):'grad_deeper_if_not_detached_mse_mean'}
    id = f'sad-{case.rstrip("_")}'
    return [
        Ref('sad_pair', lambda v,i: SAD(form='code', detach=False), neighbours, 'out_mse_mean', moved, case, id=id),
        Ref('sad_pair', lambda v,i: SAD(detach=False), neighbours, 'out_sum_sq_per_sample_mean', case=case,
            id=f'{id}-paper')]

def weighed(v): return dict(pred=v['in_zs'], target=v['in_y'], fm_s=dict(a=v['in_feat']))
weak = {f'fc.{o}':f'par_fc_{o}' for o in ('weight','bias')}
def uskd_refs(case):
    def of_row(form): return lambda v,i: USKD(**row(v, i, 'alpha_beta_mu', 'alpha', 'beta', 'mu'), form=form)
    grads = {pred:'grad_zs', fm:'grad_feat', 'fc.weight':'grad_fc_weight', 'fc.bias':'grad_fc_bias'}
    return [Ref('uskd', of_row('code'), weighed, 'out_uskd', grads, f'{case}__', weak, id=f'uskd-{case}'),
            Ref('uskd', of_row('paper'), weighed, 'out_uskd_paper_rank', {pred:'grad_zs_paper_rank'}, f'{case}__', weak,
                id=f'uskd-{case}-paper')]

def rkd_ref(name, case, *args):
    return Ref('rkd', lambda v,i: RKD(*args), maps, f'out_{name}', {fm:f'grad_fs_{name}'}, f'{case}__',
               id=f'rkd-{name}-{case}')

relation_refs = [rkd_ref(name, case, *args) for case in ('different_dims','maps')
                 for name,*args in (('combined_25_50',25,50), ('distance',1,0), ('angle',0,1))]
relation_refs += [
    Ref('sp', lambda v,i: SP(), maps, 'out_sp', of_fs, 'maps__'),
    Ref('pkt', lambda v,i: PKT(), maps, 'out_pkt', of_fs, 'vectors__'),
    Ref('cc', lambda v,i: CC(adapter=None), embedded, 'out_cc_repdistiller', {fm:'grad_embed_s'})]

refs = [
    *logit_refs, *sad_refs('equal__'), *sad_refs('target_half_size__'), *uskd_refs('hard'), *uskd_refs('soft'),
    *feature_refs, *relation_refs,
    *[attention_ref(*o) for o in product(('sum','max'), (1,2,4), ('code','paper'))],
    Ref('fitnet', lambda v,i: FitNet(adapter=None), maps, 'out_mse_mean', of_fs, 'equal__', id='fitnet-equal'),
    Ref('fitnet', lambda v,i: FitNet(adapter=pointwise), maps, 'out_mse_mean',
        of_fs|{'adapters.0.conv.weight':'grad_conv1x1_weight'}, 'projector_1x1__',
        {'adapters.0.conv.weight':'par_conv1x1_weight'}, id='fitnet-projector'),
    ofa_ref('code_T1'), ofa_ref('code_T4', T=4), ofa_ref('paper', form='paper'),
    infonce_ref('cosine_s2t'), infonce_ref('rawdot_s2t', normalize=False),
    infonce_ref('cosine_symmetric_mean', symmetric=True), infonce_ref('cosine_t2s', swapped),
    infonce_ref('rawdot_t2s', swapped, normalize=False),
    Ref('infonce', lambda v,i: InfoNCE(tau=float(v['par_tau'])), map_and_tokens, 'out_cosine_s2t',
        {fm:'grad_student_map'}, 'pooled_map_vs_tokens__', id='infonce-pooled')]

@pytest.mark.parametrize('dtype', dtypes, ids=['64','32'])
@pytest.mark.parametrize('ref', refs, ids=lambda r: r.id)
def test_vectors(ref, dtype):
    for loss,given,want,grads,par in ref.rows():
        v,got = call(loss, given, dtype, par)
        close(v, want, value_tol[dtype])
        for k,w in grads.items(): close_grad(got[k], w, grad_tol[dtype])

later = {                                           # what no row of `refs` reads; None: a test of its own reads it all
    'kd_soft_target': {'out_kl','out_soft_ce','out_ce','out_seed_formula_alpha05'},      # without T², cross-entropies
    'fitnet': {'out_half_sum_sq_per_sample_mean'},                                       # in another scale
    'ofa': {'out_tas_seed_formula'},                                               # its gradient is the paper form's
    'infonce': {'grad_fs_cosine_t2s','grad_fs_rawdot_t2s'},                  # of the teacher's side: the test below
    'sad_pair': {'out_psi_lower','out_psi_deeper'},                          # the shares themselves: a test below
    'reviewkd': {'out_hcl_per_level'} | {f'out_fused_{i}' for i in range(4)},                                # likewise
    'ab': {'out_per_stage','out_ab_times_0003','out_disagreement'} | {f'grad_fs_{i}' for i in range(3)},   # tests below
    'ofd': {'out_per_stage','out_ofd_times_0001'} | {f'out_margin_{i}' for i in range(3)},                 # likewise
    'fsp': {'out_fsp_student_0'},                                            # the table itself: a test below
    'rkd': {'out_distance_squared_variant'},                                       # not what the codes compute
    'frskd_segmentation_kl': {'out_ce_student_ignore255'}, 'seed_worked_example': None, 'fcfd_loss': None,
    'at_gradient': None, 'simkd': None, 'frskd_classification': None, 'sla': None, 'crd': None, 'sskd': None,
    'cskd': None, 'dml': None}

def test_every_vector_is_used():
    "No value or gradient lies here unread, but those another page's loss is for, or that only differ in scale"
    for f in folder.glob('*.npz'):
        if later.get(f.stem, set()) is None: continue
        with np.load(f) as d: have = {k for k in d if re.match(r'(.*__)?(out|grad)_', k)}
        used = {r.case+k for r in refs if r.file==f.stem for k in (r.out, *r.grads.values())}
        assert {k.split('__')[-1] for k in have-used}==later.get(f.stem, set()), f.stem

@pytest.mark.parametrize('kind', ['cosine','rawdot'])
def test_infonce_both_ways(kind):
    "The gradient of the symmetric form is the mean of those of its directions"
    v = Ref('infonce', None, None, None, case='vectors__').vectors
    for i,t in enumerate(v['par_tau']):
        loss = InfoNCE(tau=float(t), normalize=kind=='cosine', symmetric=True)
        got = call(loss, maps(v), torch.float64)[1][fm]
        close_grad(got, (v[f'grad_fs_{kind}_s2t'][i]+v[f'grad_fs_{kind}_t2s'][i])/2, 1e-6)

@pytest.mark.parametrize('dtype', dtypes, ids=['64','32'])
def test_fsp_matrix(dtype):
    v = Ref('fsp', None, None, None).vectors
    a,b = (torch.tensor(v[f'in_student_{i}'], dtype=dtype) for i in (0,1))
    close_grad(fsp_matrix(a, b).double().numpy(), v['out_fsp_student_0'], value_tol[dtype])

@pytest.mark.parametrize('case', ['equal__','target_half_size__'])
def test_shares_of_positions(case):
    "What SAD compares: the deeper map at the size of the other"
    v = Ref('sad_pair', None, None, None, case=case).vectors
    lower,deeper = (torch.tensor(v[f'in_{k}'], dtype=torch.float64) for k in ('lower','deeper'))
    close(position_shares(lower), v['out_psi_lower'], 1e-7)                      # kept in float32
    close(position_shares(deeper, lower.shape[2:]), v['out_psi_deeper'], 1e-7)

def stage(given, i): return {side: {'a': o[f'{i}']} for side,o in given.items()}

@pytest.mark.parametrize('dtype', dtypes, ids=['64','32'])
def test_stages_of_boundaries(dtype):
    "Each stage by itself; gradients are those of margin 1; the share of unequal signs; the factor of the authors' code"
    v = Ref('ab', None, None, None, case='plain__').vectors
    for m,whole,each,scaled in zip(v['par_margin'], v['out_ab'], v['out_per_stage'], v['out_ab_times_0003']):
        for i in range(3):
            close(call(AB(margin=float(m), adapter=None), stage(three(v), i), dtype)[0], each[i], value_tol[dtype])
        g = tensors(three(v), dtype)
        close((.003*AB(margin=float(m), adapter=None))(**g).item(), scaled, value_tol[dtype])
        value,grads = call(AB(margin=float(m), adapter=None), three(v), dtype)
        close(value, whole, value_tol[dtype])
        if m==1:
            for k,name in grads_of_maps(3, 'grad_fs_{i}').items(): close_grad(grads[k], v[name], grad_tol[dtype])
    assert 1 in v['par_margin']
    signs = [np.mean((v[f'in_fs_{i}']>0)!=(v[f'in_ft_{i}']>0)) for i in range(3)]
    close(signs, v['out_disagreement'], 1e-9)

@pytest.mark.parametrize('dtype', dtypes, ids=['64','32'])
@pytest.mark.parametrize('case', ['plain__','connector__'])
def test_stages_of_ofd(case, dtype):
    v = Ref('ofd', None, None, None, case=case).vectors
    parts,adapter = ({},{'adapter':None}) if case=='plain__' else (connectors,{})
    for i in range(3):
        loss = OFD(margins=teachers_margins()[i:i+1], **adapter)
        par = {k.replace(f'adapters.{i}', 'adapters.0'): v[o] for k,o in parts.items() if f'.{i}.' in k}
        close(call(loss, stage(three(v), i), dtype, par)[0], v['out_per_stage'][i], value_tol[dtype])
    if case=='connector__': return close(.001*v['out_ofd'], v['out_ofd_times_0001'], 1e-9)
    whole = .001*OFD(margins=teachers_margins(), adapter=None)
    close(whole(**tensors(three(v), dtype)).item(), v['out_ofd_times_0001'], value_tol[dtype])

@pytest.mark.parametrize('dtype', dtypes, ids=['64','32'])
def test_margins(dtype):
    "Negative scales, and both sides of the threshold"
    v = Ref('ofd', None, None, None).vectors
    for i in range(3):
        weight,bias = (torch.tensor(v[f'par_teacher_bn{i}_{o}'], dtype=dtype) for o in ('weight','bias'))
        close(bn_margin(weight, bias).double().numpy(), v[f'out_margin_{i}'], value_tol[dtype])

@pytest.mark.parametrize('dtype', dtypes, ids=['64','32'])
def test_fused(dtype):
    "What the fusions make of the student's maps, and how far it is from the teacher's, level by level"
    v = Ref('reviewkd', None, None, None).vectors
    g,loss = tensors(levels(v), dtype),ReviewKD()
    set_parts(loss, g, dtype, {k: v[o] for k,o in fusions.items()})
    s,t = loss.maps(**g)
    for i,(a,b) in enumerate(zip(loss.fused(s, t), t, strict=True)):
        close_grad(a.detach().double().numpy(), v[f'out_fused_{i}'], grad_tol[dtype])
        close(HCL()(fm_s={'a':a}, fm_t={'a':b}).item(), v['out_hcl_per_level'][i], value_tol[dtype])

@pytest.mark.parametrize('dtype', dtypes, ids=['64','32'])
@pytest.mark.parametrize('case', ['ordinary__','extreme__'])
def test_partners(case, dtype):
    "CSKD of items and partners that are given, alone and in a batch where each has one other of its class"
    v = Ref('cskd', None, None, None, case=case).vectors
    z,partner = (torch.tensor(v[f'in_{k}'], dtype=dtype) for k in ('zs','z_partner'))
    for t,want,grad in zip(v['par_T'], v['out_cskd'], v['grad_zs'], strict=True):
        s = z.clone().requires_grad_()
        value = CSKD(T=float(t)).loss(s, partner)
        close(value.item(), want, value_tol[dtype])
        close_grad(torch.autograd.grad(value, s)[0].double().numpy(), grad, grad_tol[dtype])
        both,y = torch.cat([z,partner]).requires_grad_(),torch.arange(8).repeat(2)
        back = softened_kl(partner.double(), z.double(), float(t)).mean().item()
        value = CSKD(T=float(t))(pred=both, target=y)
        close(value.item(), (want+back)/2, value_tol[dtype])
        close_grad(torch.autograd.grad(value, both)[0][:8].double().numpy(), grad/2, grad_tol[dtype])

@pytest.mark.parametrize('form', ['code','paper'])
def test_uskd_at_the_extremes(form):
    "Finite with logits of ±50, sure of the label or of another class, in float32 and for labels of two classes"
    z = 50*torch.eye(6)[torch.tensor([0,1,2,5])]-50*torch.eye(6)[torch.tensor([1,0,4,4])]
    for shares in (torch.eye(6)[:4], .5*torch.eye(6)[:4]+.5*torch.eye(6)[1:5]):
        s,weak = z.clone().requires_grad_(),(-z).requires_grad_()
        value = USKD(mu=1, form=form).loss(s, weak, shares)
        assert value.isfinite()
        assert all(g.isfinite().all() and g.abs().max()>0 for g in torch.autograd.grad(value, [s,weak]))

class Convolved(nn.Module):
    "The network of `at_gradient`: a convolution, softplus, the mean over positions, a linear layer"
    def __init__(self, v, who, dtype):
        super().__init__()
        def par(name): return nn.Parameter(torch.tensor(v[f'par_{who}_{name}'], dtype=dtype))
        self.conv_w,self.conv_b,self.lin_w,self.lin_b = map(par, ('conv_w','conv_b','lin_w','lin_b'))
    def forward(self, x):
        z = F.softplus(F.conv2d(x, self.conv_w, self.conv_b, padding=1))
        return z.mean((2,3))@self.lin_w+self.lin_b

class Gradients(Callback):
    "What the student's gradients are before the first step"
    def before_step(self): self.grads = {n: p.grad.double().clone().numpy() for n,p in self.model.named_parameters()}

gradient_forms = dict(batch='out_l2_whole_batch', sample='out_l2_per_sample_mean', mse='out_mse',
                      flip='out_symmetry_l2_whole_batch')

@pytest.mark.parametrize('dtype', dtypes, ids=['64','32'])
@pytest.mark.parametrize('form,out', gradient_forms.items(), ids=gradient_forms)
def test_gradient_attention(form, out, dtype):
    "In a Learner: values, and the gradients of the weights, which are second derivatives"
    v = Ref('at_gradient', None, None, None).vectors
    with floating(dtype):
        x,y = torch.tensor(v['in_x'], dtype=dtype),torch.tensor(v['in_y'])
        student,teacher = (Convolved(v, who, dtype) for who in ('student','teacher'))
        net = Net(student, x)
        for who,key in ((student,'out_Js'), (teacher,'out_Jt')):
            got = input_gradient(Net(who, x), (x,), y, F.cross_entropy)
            close_grad(got.double().numpy(), v[key], grad_tol[dtype])
        by_hand = GradientAttention(form)(xb=(x,), target=y, criterion=F.cross_entropy, student=net,
                                          **({} if form=='flip' else dict(teacher=Net(teacher, x))))
        close(by_hand.item(), v[out], value_tol[dtype])
        cb = KD(None if form=='flip' else teacher, TaskLoss()+.5*GradientAttention(form))
        seen = Gradients()
        learner(student, tuples(x, y, n=8, valid=0, bs=8), cbs=[cb,seen]).fit(1)
    close(cb.parts['gradient_attention'], v[out], value_tol[dtype])
    close(cb.parts['task_loss'], v['out_ce'], value_tol[dtype])
    for n,g in seen.grads.items():
        want = v.get(f'grad_total_{dict(batch="whole").get(form, form)}_{n}')
        if want is not None: close_grad(g, want, grad_tol[dtype])
        assert np.isfinite(g).all()

def test_seed_worked_example():
    "The softened probabilities, read off the gradient against a teacher that knows nothing: `T(p-1/C)`"
    with np.load(folder/'seed_worked_example.npz') as d: d = dict(d)
    z = d['seed_logits'][None]
    for t in d['par_T']:
        g = call(SoftTarget(T=float(t)), dict(pred=z, teacher_pred=np.zeros_like(z)), torch.float64)[1][pred]
        p = g[0]/t+1/5
        close(p, d[f'out_softmax_T{t:.0f}'], 1e-9)
        assert np.abs(p-d[f'out_printed_in_seed_T{t:.0f}']).max() < 5e-5

# ---- the formulas again, in numpy, by loops where that is plainer ----

def softmax(z):
    e = np.exp(z-z.max())
    return e/e.sum()
def log_softmax(z): return z-z.max()-np.log(np.exp(z-z.max()).sum())
def kl(s, t): return sum(p*(b-a) for p,a,b in zip(softmax(t), log_softmax(s), log_softmax(t)))
def standard(z): return (z-z.mean())/(np.sqrt(((z-z.mean())**2).sum()/(len(z)-1))+1e-7)
def unit(v): return v/max(np.sqrt((v**2).sum()), 1e-12)

def rows(z, axis=1): return np.moveaxis(z, axis, -1).reshape(-1, z.shape[axis]).astype(float)
def pairs(a, b): return zip(a.astype(float).ravel(), b.astype(float).ravel(), strict=True)

def np_soft_target(l, pred, teacher_pred):
    res = []
    for s,t in zip(rows(pred), rows(teacher_pred), strict=True):
        if l.standardize: s,t = standard(s),standard(t)
        res.append(l.T**2*kl(s/l.T, t/l.T))
    return np.mean(res)

def np_binary(l, pred, teacher_pred):
    "Each output as two classes of logits z and 0"
    return l.T**2*np.mean([kl(np.array([s/l.T,0.]), np.array([t/l.T,0.])) for s,t in pairs(pred, teacher_pred)])

def np_mse(l, pred, teacher_pred): return np.mean([(a-b)**2 for a,b in pairs(pred, teacher_pred)])

def np_ofa(l, pred, teacher_pred, target):
    "Row by row, class by class; a label is a class, or a share for each"
    shares = rows(target) if target.dtype.kind=='f' else np.eye(pred.shape[1])[target.ravel()]
    res = []
    for s,t,y in zip(rows(pred), rows(teacher_pred), shares, strict=True):
        p,log_s,total = softmax(t/l.T),log_softmax(s/l.T),0.
        for c in range(len(s)):
            own,other = ((1+p[c])**l.gamma-1,p[c]**l.gamma) if l.form=='code' else ((1+p[c])**l.gamma,p[c])
            total -= (y[c]*own+(1-y[c])*other)*log_s[c]
        res.append(total)
    return np.mean(res)

def by_label(f, pred, teacher_pred, target, mix=None):
    "The mean over rows of `f(s, t, y)`, `y` None where there is no label; of two labels what each gives, blended"
    def values(ys):
        known = [y if 0<=y<pred.shape[1] else None for y in ys.ravel()]
        return np.array([f(s, t, y) for s,t,y in zip(rows(pred), rows(teacher_pred), known, strict=True)])
    if mix is None: return values(target).mean()
    other,lam = mix[0],mix[1].astype(float)
    return (lam*values(target)+(1-lam)*values(other)).mean()

def without(z, y): return z if y is None else np.delete(z, y)
def against_rest(z, y):
    "The probability of a class, and that of all others; a class that is not known has none"
    return np.array([0. if y is None else softmax(z)[y], without(softmax(z), y).sum()])
def kl_of(p, q): return sum(a*np.log(a/b) for a,b in zip(p, q, strict=True) if a)

def np_dkd(l, **given):
    def one(s, t, y):
        if l.standardize: s,t = standard(s),standard(t)
        s,t = s/l.T,t/l.T
        others = kl(without(s, y), without(t, y))
        return l.T**2*(l.alpha*kl_of(against_rest(t, y), against_rest(s, y)) + l.beta*others)
    return by_label(one, **given)

def np_nkd(l, target, **given):
    def one(s, t, y):
        own = 0. if y is None else -softmax(t)[y]*log_softmax(s)[y]
        q,log_q = softmax(without(t, y)/l.T),log_softmax(without(s, y)/l.T)
        return own-l.gamma*l.T**2*sum(a*b for a,b in zip(q, log_q, strict=True))
    return by_label(one, target=target.argmax(1) if target.dtype.kind=='f' else target, **given)

def correlation(a, b):
    a,b = a-a.mean(),b-b.mean()
    return (a*b).sum()/(np.sqrt((a**2).sum())*np.sqrt((b**2).sum())+1e-8)

def np_dist(l, pred, teacher_pred):
    s,t = (np.array([softmax(r/l.tau) for r in rows(o)]) for o in (pred,teacher_pred))
    inter,intra = ([correlation(a, b) for a,b in zip(*o, strict=True)] for o in ((s,t),(s.T,t.T)))
    return l.tau**2*(l.beta*(1-np.mean(inter))+l.gamma*(1-np.mean(intra)))

def np_rld(l, **given):
    def one(s, t, y):
        below = [c for c in range(len(t)) if y is None or t[c]<t[y]]
        lower = kl(s[below]/l.T, t[below]/l.T) if below else 0.
        if y is None: return l.beta*l.T**2*lower
        confidence = against_rest(t/l.alpha_T, int(t.argmax()))
        sure = kl_of(confidence, against_rest(s/l.alpha_T, y))
        return l.alpha*l.alpha_T**2*sure + l.beta*l.T**2*lower
    return by_label(one, **given)

def np_wttm(l, pred, teacher_pred):
    def one(s, t):
        weight = sum(p**l.gamma for p in softmax(t)) if l.weighted else 1
        return weight*kl(s, l.gamma*t)
    return np.mean([one(s, t) for s,t in zip(rows(pred), rows(teacher_pred), strict=True)])

def np_wsl(l, pred, teacher_pred, target, mix=None, at=None):
    "The weights are those of a student that says `at`"
    def one(s, t, q, seen):
        of_s,of_t = (-(q*log_softmax(z)).sum() for z in (seen,t))
        w = 1-np.exp(-max(of_s/(of_t+1e-7), 0)) if q.any() else 1.
        return -w*l.T**2*(softmax(t/l.T)*log_softmax(s/l.T)).sum()
    shares = shares_of(target, pred.shape[1])
    if mix is not None:
        other,lam = shares_of(mix[0], pred.shape[1]),mix[1].astype(float)[:,None]
        shares = lam*shares+(1-lam)*other
    seen = rows(pred if at is None else at)
    return np.mean([one(*o) for o in zip(rows(pred), rows(teacher_pred), shares, seen, strict=True)])

def shares_of(target, classes):
    "A row of shares for each label, all 0 where it is missing"
    if target.dtype.kind=='f': return rows(target)
    return np.stack([(np.arange(classes)==y).astype(float) for y in target.ravel()])

def np_adjusted(l, pred, teacher_pred, target=None, at=None):
    "The temperatures are those of a student that says `at`"
    s,t,seen = rows(pred),rows(teacher_pred),rows(pred if at is None else at)
    labels = [None]*len(s) if target is None else target.ravel()
    taus = np.full(len(s), l.T)
    if l.dynamic=='cwsm': w = np.array([1/(softmax(a).max()+1e-3) for a in seen])
    if l.dynamic=='flsw':
        def length(a): return np.sqrt((a**2).sum())+1e-4
        cos = [(a*b).sum()/length(a)/length(b) for a,b in zip(seen, t, strict=True)]
        w = np.maximum(1-np.array(cos), 0)**l.gamma
    if l.dynamic: taus = np.maximum(l.T+(w.mean()-w)*l.beta, 1)
    return np.mean([tau**2*kl(a/tau, np_shown(l, b, y, tau)) for a,b,y,tau in zip(s, t, labels, taus, strict=True)])

def np_shown(l, t, y, tau):
    "Logits of what the student is shown"
    right = l.adjust is None or not 0<=y<len(t) or t.argmax()==y
    if right: return t/tau
    if l.adjust=='smooth': return np.log((1-l.eps)*(np.arange(len(t))==y)+l.eps/len(t))
    best,t = t.argmax(),t.copy()
    t[[best,y]] = t[[y,best]]
    return t/tau

def np_mutual(l, pred, teacher_pred): return np.mean([kl(*o) for o in zip(rows(pred), rows(teacher_pred), strict=True)])
def np_hard(l, pred, teacher_pred):
    return -np.mean([log_softmax(s)[t.argmax()] for s,t in zip(rows(pred), rows(teacher_pred), strict=True)])

def np_rkd(l, **given):
    "Pair by pair and corner by corner"
    def distances(z):
        n = range(len(z))
        d = np.array([[0. if i==j else np.sqrt(max(((z[i]-z[j])**2).sum(), 1e-12)) for j in n] for i in n])
        return d/d[d>0].mean()
    def angles(z):
        n = range(len(z))
        to = [[unit(z[j]-z[i]) for j in n] for i in n]
        return np.array([[[(to[i][j]*to[i][k]).sum() for k in n] for j in n] for i in n])
    def smooth(a, b):
        d = np.abs(a-b)
        return np.where(d<1, d**2/2, d-1/2).mean()
    return sum(l.distance*smooth(distances(s), distances(t)) + l.angle*smooth(angles(s), angles(t))
               for s,t in flat_rows(**given))

def flat_rows(fm_s, fm_t):
    "Pairs of `(B,D)`"
    for s,t in zip(fm_s.values(), fm_t.values(), strict=True):
        yield [z.astype(float).reshape(len(z), -1) for z in (s,t)]

def np_sp(l, **given):
    def table(z): return np.array([unit(np.array([(a*b).sum() for b in z])) for a in z])
    return sum(((table(s)-table(t))**2).mean() for s,t in flat_rows(**given))

def np_pkt(l, **given):
    def length(v): return np.sqrt((v**2).sum())+1e-7
    def likely(z):
        near = np.array([[((a*b).sum()/length(a)/length(b)+1)/2 for b in z] for a in z])
        return near/near.sum(1, keepdims=True)
    def pair(s, t): return (t*np.log((t+1e-7)/(s+1e-7))).mean()
    return sum(pair(likely(s), likely(t)) for s,t in flat_rows(**given))

def np_cc(l, **given):
    def kernel(z):
        cos = np.array([[(unit(a)*unit(b)).sum() for b in z] for a in z])
        return sum(np.exp(-2*l.gamma)*(2*l.gamma*cos)**p/factorial(p) for p in range(l.P+1))
    def neighbours(s, t): return np.mean([sum(abs(s[i]-t[i])*abs(s[i+1]-t[i+1])) for i in range(len(s)-1)])
    if l.form=='code': return sum(neighbours(s, t) for s,t in flat_rows(**given))
    return sum(((kernel(s)-kernel(t))**2).mean() for s,t in flat_rows(**given))

def np_fitnet(l, fm_s, fm_t): return sum(np_mse(l, fm_s[k], fm_t[k]) for k in fm_s)

def np_pool(z, h, w):
    "Every cell of an h×w grid is the mean of the pixels it touches"
    H,W = z.shape[-2:]
    def span(i, n, N): return slice(i*N//n, -(-(i+1)*N//n))
    def row(i): return [z[...,span(i, h, H),span(j, w, W)].mean((-2,-1)) for j in range(w)]
    return np.stack([np.stack(row(i), -1) for i in range(h)], -2)

def np_energy(l, o):
    "The attention map of one item `(C,H,W)`, of length 1"
    q = np.abs(o)**l.p
    return unit(q.sum(0) if l.map=='sum' else q.max(0))

def np_attention(l, fm_s, fm_t):
    total = 0.
    for s,t in zip(fm_s.values(), fm_t.values(), strict=True):
        h,w = min(s.shape[2], t.shape[2]),min(s.shape[3], t.shape[3])
        s,t = (np_pool(o.astype(float), h, w) for o in (s,t))
        ds = [((np_energy(l, a)-np_energy(l, b))**2).sum() for a,b in zip(s, t)]
        total += np.mean(ds)/(h*w) if l.form=='code' else np.sqrt(ds).mean()
    return total

def np_vectors(l, z):
    "A row an item"
    if z.ndim==3: z = z[:,z.shape[1]-int(np.sqrt(z.shape[1]))**2:].mean(1)      # before the square stand other tokens
    if z.ndim==4: z = z.mean((2,3))
    return [unit(v) if l.normalize else v for v in z.astype(float)]

def np_find(l, a, b):
    "How hard it is for each row of `a` to find its own of `b`"
    return -np.mean([log_softmax(np.array([(u*v).sum() for v in b])/l.tau)[i] for i,u in enumerate(a)])

def np_infonce(l, fm_s, fm_t):
    both = [(np_vectors(l, s),np_vectors(l, t)) for s,t in zip(fm_s.values(), fm_t.values(), strict=True)]
    if l.symmetric: both = [p for s,t in both for p in ((s,t),(t,s))]
    return sum(np_find(l, a, b) for a,b in both)/(2 if l.symmetric else 1)

def np_same_size(s, t):
    h,w = min(s.shape[2], t.shape[2]),min(s.shape[3], t.shape[3])
    return [np_pool(o.astype(float), h, w) for o in (s,t)]

def np_nst(l, fm_s, fm_t):
    "Channel by channel"
    def kernel(a, b): return np.mean([(u*v).sum()**2 for u in a for v in b])
    total = 0.
    for s,t in zip(fm_s.values(), fm_t.values(), strict=True):
        items = [[[unit(c.ravel()) for c in o] for o in z] for z in np_same_size(s, t)]
        total += np.mean([kernel(a, a)+kernel(b, b)-2*kernel(a, b) for a,b in zip(*items, strict=True)])
    return total

def np_enlarged(a, h, w):
    "`(H,W)` at `h` by `w` places, each between its two neighbours of each direction; the borders go on outwards"
    def between(n, m):
        at = np.clip((np.arange(m)+.5)*n/m-.5, 0, n-1)
        i = np.minimum(np.floor(at).astype(int), n-2) if n>1 else np.zeros(m, dtype=int)
        return i,np.minimum(i+1, n-1),at-i
    (i,i1,u),(j,j1,v) = between(a.shape[0], h),between(a.shape[1], w)
    rows = a[i]*(1-u)[:,None]+a[i1]*u[:,None]
    return rows[:,j]*(1-v)+rows[:,j1]*v

def np_sad(l, fm_s):
    "Neighbour by neighbour, item by item"
    total = 0.
    for a,b in zip([*fm_s.values()][:-1], [*fm_s.values()][1:], strict=True):
        def shares(z): return softmax(np_enlarged((z.astype(float)**2).sum(0), *a.shape[2:]).ravel()/l.T)
        squares = [(shares(x)-shares(y))**2 for x,y in zip(a, b, strict=True)]
        total += np.mean([o.mean() if l.form=='code' else o.sum() for o in squares])
    return total

def np_fsp(l, fm_s, fm_t):
    "Neighbour by neighbour, item by item, channel by channel"
    def tables(maps): return [[table(*o) for o in zip(*np_same_size(a, b), strict=True)]
                              for a,b in zip(maps[:-1], maps[1:], strict=True)]
    def table(a, b): return np.array([[(later*earlier).mean() for earlier in a] for later in b])
    total = 0.
    for s,t in zip(tables([*fm_s.values()]), tables([*fm_t.values()]), strict=True):
        squares = [(a-b)**2 for a,b in zip(s, t, strict=True)]
        total += np.mean([o.mean() if l.form=='code' else o.sum() for o in squares])
    return total

def np_neurons(l, fm_s, fm_t, cost):
    "Neuron by neuron; the last stage counts 1, each one before it half as much as the next"
    total,n = 0.,len(fm_s)
    for i,(s,t) in enumerate(zip(fm_s.values(), fm_t.values(), strict=True)):
        s,t = np_same_size(s, t)
        costs = [cost(i, c, a, b) for item in zip(s, t) for c,maps in enumerate(zip(*item)) for a,b in pairs(*maps)]
        total += 2.**(i+1-n)*sum(costs)/len(s)
    return total

def np_ab(l, fm_s, fm_t):
    def cost(i, c, a, b): return max(0, l.margin-a)**2 if b>0 else max(0, l.margin+a)**2
    return np_neurons(l, fm_s, fm_t, cost)

def np_ofd(l, fm_s, fm_t):
    def cost(i, c, a, b):
        b = max(b, np.broadcast_to(l.margins[i], 99)[c])
        return 0. if a<=b<=0 else (a-b)**2
    return np_neurons(l, fm_s, fm_t, cost)

def np_pooled(z): return z.astype(float) if z.ndim==2 else z.astype(float).mean((2,3))

def np_cosine(l, fm_s, fm_t):
    both = [zip(np_pooled(fm_s[k]), np_pooled(fm_t[k]), strict=True) for k in fm_s]
    return sum(1-np.mean([(unit(a)*unit(b)).sum() for a,b in p]) for p in both)

def np_wkd(l, fm_s, fm_t):
    "Window by window, channel by channel"
    def span(i, n): return slice(i*n//l.grid, -(-(i+1)*n//l.grid))
    total = 0.
    for s,t in zip(fm_s.values(), fm_t.values(), strict=True):
        for i,j in product(range(l.grid), repeat=2):
            for a,b in zip(s.astype(float).reshape(-1, *s.shape[2:]), t.astype(float).reshape(-1, *s.shape[2:])):
                a,b = (o[span(i, s.shape[2]),span(j, s.shape[3])] for o in (a,b))
                sd = [np.sqrt(((o-o.mean())**2).sum()/(o.size-1)+l.eps) for o in (a,b)]
                total += (l.ratio*(a.mean()-b.mean())**2+(sd[0]-sd[1])**2)/len(s)/l.grid**2
    return total

def np_hcl_of(s, t):
    n = s.shape[2]
    scales = [n,*[l for l in (4,2,1) if l<n]]
    weights = [.5**k for k in range(len(scales))]
    errors = [np.mean((s-t)**2), *[np.mean((np_pool(s, l, l)-np_pool(t, l, l))**2) for l in scales[1:]]]
    return np.dot(weights, errors)/sum(weights)

def np_hcl(l, fm_s, fm_t): return sum(np_hcl_of(fm_s[k].astype(float), fm_t[k].astype(float)) for k in fm_s)

formulas = {
    SoftTarget:np_soft_target, BinarySoftTarget:np_binary, Logits:np_mse, Attention:np_attention, FitNet:np_fitnet,
    OFALogits:np_ofa, InfoNCE:np_infonce, DKD:np_dkd, RLD:np_rld, WTTM:np_wttm, NKD:np_nkd, DIST:np_dist,
    NST:np_nst, FSP:np_fsp, SAD:np_sad, HardTarget:np_hard, Mutual:np_mutual, WSL:np_wsl,
    AdjustedSoftTarget:np_adjusted, SP:np_sp, PKT:np_pkt, RKD:np_rkd, AB:np_ab, OFD:np_ofd, HCL:np_hcl,
    CC:np_cc, Cosine:np_cosine, WKD:np_wkd}

# ---- other seeds and odd shapes ----

def normal(rng, shape, scale=1):
    "Exact in float32"
    return np.round(scale*256*rng.standard_normal(shape))/256

def some_logits(*shape): return lambda rng: dict(pred=normal(rng, shape, 3), teacher_pred=normal(rng, shape, 3))
def some_maps(*pairs):
    def make(rng):
        s,t = ({f'{i}': normal(rng, p[side]) for i,p in enumerate(pairs)} for side in (0,1))
        return dict(fm_s=s, fm_t=t)
    return make
def own_maps(*shapes): return lambda rng: dict(fm_s={f'{i}': normal(rng, o) for i,o in enumerate(shapes)})
def labelled_logits(*shape):
    return lambda rng: dict(some_logits(*shape)(rng), target=rng.integers(0, shape[1], (shape[0],*shape[2:])))
def softly_labelled(*shape):
    def make(rng):
        given = some_logits(*shape)(rng)
        return dict(given, target=rng.dirichlet(np.ones(shape[1]), shape[0]).astype(np.float32))
    return make

def gappy(*shape):
    "Integer labels, of which two are missing"
    def make(rng):
        given = labelled_logits(*shape)(rng)
        given['target'][:2] = -100
        return given
    return make
def mixed(*shape):
    "Two labels each, of which one and another are missing"
    def make(rng):
        given,n = gappy(*shape)(rng),shape[0]
        other = rng.integers(0, shape[1], n)
        other[1:3] = -100
        return dict(given, mix=(other,rng.random(n).astype(np.float32)))
    return make

blocks,odd_blocks = own_maps((5,3,8,6), (5,6,4,3), (5,9,2,2)),own_maps((5,7,9,5), (5,11,4,7))
odd,dense = some_logits(5, 37),some_logits(4, 5, 3, 2)
even_maps = some_maps(((5,7,5,5),(5,7,5,5)), ((5,3,4,6),(5,3,4,6)))
unequal = some_maps(((5,6,9,7),(5,11,4,3)), ((5,6,3,8),(5,4,5,5)), ((5,6,4,4),(5,3,4,4)))
same_widths = some_maps(((5,6,9,7),(5,6,4,3)), ((5,6,3,8),(5,6,5,5)), ((5,3,4,4),(5,3,4,4)))
deep = some_maps(((5,3,9,7),(5,3,5,5)), ((5,6,4,8),(5,6,3,6)), ((5,2,4,3),(5,2,7,1)))
vectors_or_maps = some_maps(((5,9),(5,9))),some_maps(((5,6,3,4),(5,17,6)), ((5,9,7),(5,7,2,2)))
forms = 'code','paper'

derived = [
    *[(SoftTarget(T=t, standardize=st), odd) for t in (1.,2.5,8.) for st in (False,True)],
    (SoftTarget(), some_logits(1, 2)), (SoftTarget(), dense), (SoftTarget(T=2., standardize=True), dense),
    (BinarySoftTarget(T=1.), odd), (BinarySoftTarget(T=3.), odd),
    (BinarySoftTarget(T=2.), some_logits(5)), (BinarySoftTarget(T=1.), some_logits(5, 1)),
    (Logits(), odd), (Logits(), some_logits(5)), (Logits(), some_logits(5, 3, 4, 2)),
    *[(Attention(p=p, map=m, form=form), g)
      for p,m,form,g in product((1,2,3,4), ('sum','max'), forms, (even_maps,unequal))],
    (FitNet(adapter=None), even_maps),
    (NST(), even_maps), (NST(), unequal),
    *[(SAD(T=t, form=form, detach=False), g) for t,form,g in product((1.,8.), ('paper','code'), (blocks,odd_blocks))],
    (Cosine(adapter=None), some_maps(((5,9),(5,9)), ((5,6,3,4),(5,6,2,5)))),
    *[(WKD(ratio=r, grid=g, adapter=None), even_maps) for r,g in ((4.,1),(2.,2))],
    (HCL(), even_maps), (HCL(), some_maps(((5,3,9,7),(5,3,9,7)), ((5,2,3,3),(5,2,3,3)), ((5,4,1,1),(5,4,1,1)))),
    *[(AB(margin=m, adapter=None), g) for m,g in product((1.,.3), (even_maps,same_widths))],
    *[(OFD(margins=[-.4,-1.,-.1][:n], adapter=None), g) for n,g in ((2,even_maps),(3,same_widths))],
    *[(FSP(form=form), g) for form,g in product(forms, (even_maps,deep))],
    *[(InfoNCE(tau=t, **k), g)
      for t,k,g in product((.07,1.), ({},dict(normalize=False),dict(symmetric=True)), vectors_or_maps)],
    *[(OFALogits(gamma=g, T=t, form=form), labels(5, 37))
      for (g,t),form,labels in product([(1.,1.),(1.3,1.),(2.5,4.)], forms, (labelled_logits,softly_labelled))],
    *[(DKD(alpha=a, beta=b, T=t, standardize=st), labels(5, 37))
      for (a,b,t),st,labels in product([(1.,8.,4.),(2.,.5,1.)], (False,True), (labelled_logits,gappy,mixed))],
    *[(NKD(gamma=g, T=t), labels(5, 37))
      for (g,t),labels in product([(1.5,1.),(3.5,3.)], (labelled_logits,softly_labelled,gappy,mixed))],
    (NKD(), labelled_logits(1, 2)), (NKD(T=2.), labelled_logits(4, 5, 3, 2)),
    *[(DIST(beta=b, gamma=g, tau=t), odd) for b,g,t in ((1.,1.,1.),(2.,.5,4.))], (DIST(), dense),
    *[(RLD(alpha=a, beta=b, T=t, alpha_T=at), labels(5, 37))
      for (a,b,t,at),labels in product([(1.,8.,4.,1.),(2.,.5,1.,4.)], (labelled_logits,gappy,mixed))],
    (RLD(), labelled_logits(1, 2)), (RLD(), labelled_logits(4, 5, 3, 2)),
    *[(WTTM(gamma=g, weighted=w), inputs) for g,w,inputs in product((.1,.5,1.), (True,False), (odd,dense))],
    *[(WSL(T=t), labels(5, 37)) for t,labels in product((2.,4.), (labelled_logits,softly_labelled,gappy,mixed))],
    (WSL(), labelled_logits(4, 5, 3, 2)),
    *[(AdjustedSoftTarget(adjust=a, dynamic=d, beta=2., gamma=1.5), labels(5, 7))
      for a,d,labels in product(('swap','smooth'), (None,'flsw','cwsm'), (labelled_logits,gappy))],
    *[(AdjustedSoftTarget(adjust=None, dynamic=d), inputs) for d,inputs in product(('flsw','cwsm'), (odd,dense))],
    (AdjustedSoftTarget(dynamic='cwsm'), labelled_logits(4, 5, 3, 2)),
    *[(loss, inputs) for loss,inputs in product((HardTarget(),Mutual()), (odd,dense,some_logits(1, 2)))],
    *[(RKD(distance=d, angle=a), g) for d,a,g in product((0.,25.), (0.,50.), (*vectors_or_maps,unequal)) if d or a],
    *[(loss, g) for loss,g in product((SP(),PKT()), (*vectors_or_maps,unequal))],
    *[(CC('paper', **k), g) for k,g in product(({},dict(gamma=1., P=4)), (*vectors_or_maps,unequal))],
    (CC(adapter=None), even_maps),
    (DKD(), labelled_logits(1, 2)), (DKD(T=2.), labelled_logits(4, 5, 3, 2)),
    (OFALogits(gamma=1.4), labelled_logits(1, 2)), (OFALogits(gamma=1.4, T=2.), labelled_logits(4, 5, 3, 2))]

without_gradient = WSL,AdjustedSoftTarget      # they weigh by numbers without gradient, which the formula fixes `at`

def name(o):
    if isinstance(o, nn.Module): return repr(o).replace(' ', '')
    if callable(o):
        first = next(iter(leaves(o(np.random.default_rng(0))).values()))
        return 'x'.join(map(str, first.shape))
each_derived = pytest.mark.parametrize('loss,inputs', derived, ids=name)

def slope(f, given, direction, h=1e-6):
    "The central difference of a formula where the student's arrays move"
    def moved(e):
        def move(n, a, k): return a+e*direction[n,k] if n in student_side else a
        return {n: {k: move(n, a, k) for k,a in o.items()} if isinstance(o, dict) else move(n, o, None)
                for n,o in given.items()}
    return (f(**moved(h))-f(**moved(-h)))/(2*h)

@pytest.mark.parametrize('seed', [0,1])
@each_derived
def test_derived(loss, inputs, seed):
    "Values in both precisions; gradients against central differences of the numpy formula, along random directions"
    rng = np.random.default_rng(seed)
    given = inputs(rng)
    f = partial(formulas[type(loss)], loss)
    v,grads = call(loss, given, torch.float64)
    v32,grads32 = call(loss, given, torch.float32)
    want = f(**given)
    close(v, want, 1e-9)
    close(v32, want, 2e-5)
    for k,g in grads.items(): close_grad(grads32[k], g, 1e-4)
    if isinstance(loss, without_gradient): f = partial(f, at=given['pred'])
    for _ in range(3):
        d = {k: rng.standard_normal(a.shape) for k,a in leaves(given).items()}
        along = sum((grads[k]*d[k]).sum() for k in d)
        size = sum(np.linalg.norm(grads[k])*np.linalg.norm(d[k]) for k in d)
        assert abs(slope(f, given, d)-along) < 1e-6*size

# ---- losses with learned parts: the formula gets their numbers, too ----

def np_conv(z, w):
    "Of 1×1, without a bias"
    return np.einsum('bchw,dc->bdhw', z.astype(float), w[:,:,0,0])
def relu(z): return np.maximum(z, 0)
def softplus(z): return np.log(1+np.exp(z))

def np_vid(l, par, fm_s, fm_t):
    "Channel by channel: the negative log-density of a normal distribution, less its constant"
    total = 0.
    for k,(s,t) in enumerate(zip(fm_s.values(), fm_t.values(), strict=True)):
        w = [par[f'adapters.{k}.mean.{i}.weight'] for i in (0,2,4)]
        mean,t = np_same_size(np_conv(relu(np_conv(relu(np_conv(s, w[0])), w[1])), w[2]), t)
        v = softplus(par[f'adapters.{k}.log_scale'])+l.eps
        density = [np.exp(-(m-o)**2/2/c)/np.sqrt(2*np.pi*c) for m,o,c in zip(mean.swapaxes(0,1), t.swapaxes(0,1), v)]
        total -= np.mean(np.log(density))+np.log(2*np.pi)/2
    return total

def np_norm(z, weight, bias):
    mean,var = z.mean((0,2,3), keepdims=True),z.var((0,2,3), keepdims=True)
    return (z-mean)/np.sqrt(var+1e-5)*weight[:,None,None]+bias[:,None,None]

def np_conv3(z, w):
    "Of 3×3, with a border of zeros: tap by tap"
    H,W = z.shape[2:]
    p = np.pad(z, ((0,0),(0,0),(1,1),(1,1)))
    return sum(np_conv(p[:,:,i:i+H,j:j+W], w[:,:,i:i+1,j:j+1]) for i in range(3) for j in range(3))

def np_nearest(z, h, w):
    H,W = z.shape[2:]
    return z[:,:,[i*H//h for i in range(h)]][:,:,:,[j*W//w for j in range(w)]]

def np_reviewkd(l, par, fm_s, fm_t):
    "From deep to shallow"
    total,r = 0.,None
    for i,(s,t) in reversed([*enumerate(zip(fm_s.values(), fm_t.values(), strict=True))]):
        p = {k.removeprefix(f'fusions.{i}.'): a for k,a in par.items() if k.startswith(f'fusions.{i}.')}
        x = np_norm(np_conv(s, p['conv1.weight']), p['bn1.weight'], p['bn1.bias'])
        if r is not None:
            r = np_nearest(r, *x.shape[2:])
            a = np_conv(np.concatenate([x,r], 1), p['att.weight'])+p['att.bias'][:,None,None]
            a = 1/(1+np.exp(-a))
            x = a[:,:1]*x+a[:,1:]*r
        r = np_nearest(x, *t.shape[2:])
        y = np_norm(np_conv3(r, p['conv2.weight']), p['bn2.weight'], p['bn2.bias'])
        total += np_hcl_of(y, t.astype(float))
    return total

def np_srd(l, par, fm_s, fm_t):
    total = 0.
    for i,(s,t) in enumerate(zip(fm_s.values(), fm_t.values(), strict=True)):
        s = np_pooled(s)@par[f'adapters.{i}.linear.weight'].T+par[f'adapters.{i}.linear.bias']
        s,t = ((z-z.mean(0))/np.sqrt(z.var(0)+1e-4) for z in (s,np_pooled(t)))
        total += np.log((np.abs(s-t)**l.alpha).sum())
    return total

def np_larger_conv(z, w):
    "Of any kernel, without a border: place by place"
    h,w_ = w.shape[2:]
    H,W = (n-k+1 for n,k in zip(z.shape[2:], (h,w_), strict=True))
    places = [np.tensordot(z[:,:,i:i+h,j:j+w_], w, ((1,2,3),(1,2,3))) for i in range(H) for j in range(W)]
    return np.stack(places, -1).reshape(len(z), len(w), H, W)

def np_hint(l, par, fm_s, fm_t):
    "Behind a valid convolution over the difference of sizes, BatchNorm and ReLU"
    total = 0.
    for i,(s,t) in enumerate(zip(fm_s.values(), fm_t.values(), strict=True)):
        conv,*norm = (par[f'adapters.{i}.{o}'] for o in ('conv.weight','conv.bias','bn.weight','bn.bias'))
        z = np_larger_conv(s.astype(float), conv)+norm[0][:,None,None]
        total += ((relu(np_norm(z, *norm[1:]))-t)**2).mean()
    return total

def through_a_hint(): return FitNet(hint)

formulas_of_parts = {VID:np_vid, ReviewKD:np_reviewkd, SRD:np_srd, FitNet:np_hint}
stages_and_vector = some_maps(((5,3,8,6),(5,7,8,6)), ((5,4,5,3),(5,2,5,3)), ((5,6,1,1),(5,4,1,1)))
derived_parts = [*[(VID, g) for g in (even_maps,unequal)], (ReviewKD, stages_and_vector), (ReviewKD, deep),
                 (SRD, some_maps(((5,9),(5,7)), ((5,6,3,4),(5,4,2,5)))),
                 (through_a_hint, some_maps(((5,3,6,7),(5,4,3,5)), ((5,2,5,5),(5,3,5,5))))]

def parts_of(make, given, rng):
    "Arrays for the parts that the loss learns"
    loss = make()
    loss.build(**{n: {k: torch.tensor(a, dtype=torch.float32) for k,a in given[n].items()} for n in ('fm_s','fm_t')})
    return {n: normal(rng, p.shape, .5) for n,p in loss.named_parameters()}

@pytest.mark.parametrize('seed', [0,1])
@pytest.mark.parametrize('make,inputs', derived_parts, ids=lambda o: getattr(o, '__name__', None) or name(o))
def test_derived_with_parts(make, inputs, seed):
    "As `test_derived`; the gradients of the learned parts, too"
    rng = np.random.default_rng(seed)
    given = inputs(rng)
    par = parts_of(make, given, rng)
    f = partial(formulas_of_parts[type(make())], make())
    v,grads = call(make(), given, torch.float64, par)
    v32,grads32 = call(make(), given, torch.float32, par)
    want = f(par, **given)
    close(v, want, 1e-9)
    close(v32, want, 2e-5)
    largest = max(np.abs(g).max() for g in grads.values())
    for k,g in grads.items():
        if np.abs(g).max()<1e-12*largest:                # 0, as of what a norm takes off
            assert np.abs(grads32[k]).max()<1e-4*largest
        else: close_grad(grads32[k], g, 1e-4)
    of_maps = {k: g for k,g in grads.items() if isinstance(k, tuple)}
    of_parts = {k: g for k,g in grads.items() if k not in of_maps}
    for _ in range(3):
        d = {k: rng.standard_normal(g.shape) for k,g in grads.items()}
        for some,there in ((of_maps, slope(partial(f, par), given, d)), (of_parts, slope_of_parts(f, par, given, d))):
            along = sum((g*d[k]).sum() for k,g in some.items())
            size = sum(np.linalg.norm(g)*np.linalg.norm(d[k]) for k,g in some.items())
            assert abs(there-along) < 1e-6*size

def slope_of_parts(f, par, given, direction, h=1e-6):
    "The central difference where the learned parts move"
    def moved(e): return f({n: a+e*direction[n] for n,a in par.items()}, **given)
    return (moved(h)-moved(-h))/(2*h)

# ---- extremes, in float32 ----

def extreme_logits(rng, shape):
    """Every entry exactly 50 or -50; first item all alike for the student, then for the teacher, then the opposite of
    the teacher, then equal to it"""
    s,t = (rng.choice([-50.,50.], shape) for _ in range(2))
    if len(s)>3: s[0],t[1],s[2],s[3] = 50,-50,-t[2],t[3]
    return dict(pred=s, teacher_pred=t)

def large_and_zero_maps(given):
    "Scaled by 50; the first sample is zero for the student, the second for the teacher, the third for both"
    for side,zero in (('fm_s',(0,2)), ('fm_t',(1,2))):
        for a in given.get(side, {}).values():
            a *= 50
            for r in zero: a[r] = 0
    return given

def zeros(given): return each_array(given, lambda n,o: np.zeros_like(o))

@each_derived
def test_extremes(loss, inputs):
    rng = np.random.default_rng(0)
    given = inputs(rng)
    if 'fm_s' in given: extreme = large_and_zero_maps(given)
    else: extreme = given|extreme_logits(rng, given['pred'].shape)
    for case in (extreme,zeros(given)):
        v,grads = call(loss, case, torch.float32)
        assert np.isfinite(v)
        assert all(np.isfinite(g).all() for g in grads.values())
        close(v, formulas[type(loss)](loss, **case), 2e-5)

# ---- yes-or-no outputs ----

def test_binary_is_soft_target_on_two_classes():
    g = tensors(odd(np.random.default_rng(3)), torch.float64)
    two = {k: torch.stack([o.flatten(), torch.zeros(o.numel(), dtype=o.dtype)], 1) for k,o in g.items()}
    for t in (1.,4.):
        a,b = BinarySoftTarget(T=t)(**g),SoftTarget(T=t)(**two)
        close(a.item(), b.item(), 1e-9)
        ga,gb = (torch.autograd.grad(o, g['pred'])[0].numpy() for o in (a,b))
        close_grad(ga, gb, 1e-9)

unlike_shapes = [((8,10),(10,8)), ((6,),(2,3)), ((2,3),(6,)), ((2,6),(2,2,3)), ((4,1),(1,4))]

@pytest.mark.parametrize('loss', [BinarySoftTarget(),Logits()], ids=name)
def test_one_column(loss):
    "`(B,1)` and `(B,)` are the same outputs; nothing else is reshaped"
    s,t = torch.randn(2, 6)
    want = loss(pred=s, teacher_pred=t)
    for a,b in product((s,s[:,None]), (t,t[:,None])): assert loss(pred=a, teacher_pred=b)==want
    for a,b in unlike_shapes:
        with pytest.raises(ValueError, match=re.escape(str(a))): loss(pred=torch.randn(a), teacher_pred=torch.randn(b))

# ---- dense and sequence outputs ----

def some_labels(shape, ignore, rng, share=.3):
    "Four classes, and the label that is ignored"
    y = rng.integers(0, 4, shape)
    y[rng.random(shape)<share] = ignore
    return y

dense_outputs = dict( # the loss function, shape of the outputs, axis of the classes, shape of the labels, ignored label
    CrossEntropyLoss=(nn.CrossEntropyLoss(ignore_index=255), (3,5,4,6), 1, (3,4,6), 255), **{
    'CrossEntropyLoss-default': (nn.CrossEntropyLoss(), (3,5,4,6), 1, (3,4,6), -100),
    'CrossEntropyLoss-square': (nn.CrossEntropyLoss(), (3,5,5,5), 1, (3,5,5), -100),
    'CrossEntropyLoss-sequence': (nn.CrossEntropyLoss(), (3,5,7), 1, (3,7), -100),
    'CrossEntropyLoss-sequence-square': (nn.CrossEntropyLoss(), (3,5,5), 1, (3,5), -100),
    'cross_entropy-sequence-square': (F.cross_entropy, (3,5,5), 1, (3,5), None),
    'Flat-axis1': (CrossEntropyLossFlat(axis=1, ignore_index=255), (3,5,4,6), 1, (3,4,6), 255),
    'Flat-axis1-channel': (CrossEntropyLossFlat(axis=1), (3,5,4,6), 1, (3,1,4,6), -100),
    'Flat-axis1-square': (CrossEntropyLossFlat(axis=1), (3,5,5,5), 1, (3,5,5), -100),
    'Flat-axis-1': (CrossEntropyLossFlat(axis=-1), (3,7,5), 2, (3,7), -100),
    'Flat-axis-1-square': (CrossEntropyLossFlat(axis=-1, ignore_index=1), (3,5,5), 2, (3,5), 1),
    'Flat-axis-1-dense': (CrossEntropyLossFlat(axis=-1), (3,4,6,5), 3, (3,4,6), -100),
    'none-dense': (None, (3,5,4,6), 1, (3,4,6), None),
    'none-sequence': (None, (3,7,5), 2, (3,7), None)})
@pytest.mark.parametrize('standardize', [False,True], ids=['','standardize'])
@pytest.mark.parametrize('criterion,shape,axis,labels,ignore', dense_outputs.values(), ids=dense_outputs)
def test_dense(criterion, shape, axis, labels, ignore, standardize):
    "The mean over the pixels or positions whose label the loss function does not leave out"
    rng = np.random.default_rng(0)
    s,t = normal(rng, (2,*shape), 3)
    y = some_labels(labels, 0 if ignore is None else ignore, rng)
    keep = np.ones(y.size, bool) if ignore is None else y.ravel()!=ignore
    assert ignore is None or 0<keep.sum()<y.size
    loss,given = SoftTarget(T=3, standardize=standardize),dict(pred=s, teacher_pred=t, target=y, criterion=criterion)
    s_rows,t_rows = rows(s, axis),rows(t, axis)
    want = np_soft_target(loss, s_rows[keep], t_rows[keep])
    v,grads = call(loss, given, torch.float64)
    close(v, want, 1e-9)
    close(call(loss, given, torch.float32)[0], want, 2e-5)
    g = rows(grads[pred], axis)
    assert not g[~keep].any()
    assert g[keep].any(1).all()
    if not standardize:                                          # closed form: T(p_s-p_t)/n for each pixel
        for i in rng.choice(np.flatnonzero(keep), 3):
            close_grad(g[i], 3*(softmax(s_rows[i]/3)-softmax(t_rows[i]/3))/keep.sum(), 1e-9)
    if criterion is not None and ignore is not None: criterion(torch.tensor(s), torch.tensor(y))   # it reads these too

def test_everything_ignored():
    given = dict(pred=np.ones((2,3,4,4)), teacher_pred=np.zeros((2,3,4,4)), target=np.full((2,4,4), 255),
                 criterion=nn.CrossEntropyLoss(ignore_index=255))
    v,grads = call(SoftTarget(), given, torch.float32)
    assert v==0
    assert not grads[pred].any()

def test_dense_soft_labels():
    "Labels that are probabilities ignore nothing"
    rng = np.random.default_rng(0)
    s,t = normal(rng, (2,2,5,4,6), 3)
    y = np.moveaxis(rng.dirichlet(np.ones(5), (2,4,6)), -1, 1)
    criterion = nn.CrossEntropyLoss()
    criterion(torch.tensor(s), torch.tensor(y))
    v,_ = call(SoftTarget(), dict(pred=s, teacher_pred=t, target=y, criterion=criterion), torch.float64)
    close(v, np_soft_target(SoftTarget(), rows(s), rows(t)), 1e-9)

# ---- what is refused, and which loss is named instead ----

def z(*shape): return torch.randn(shape)
def both(*shape): return dict(pred=z(*shape), teacher_pred=z(*shape))

regressions = MSELossFlat(),nn.L1Loss(),F.mse_loss,nn.SmoothL1Loss()
yes_or_no = (BCEWithLogitsLossFlat(),nn.BCEWithLogitsLoss(),F.binary_cross_entropy_with_logits,
             nn.MultiLabelSoftMarginLoss())
one_of_several = CrossEntropyLossFlat(),nn.CrossEntropyLoss(),FocalLossFlat(),LabelSmoothingCrossEntropy()

refused = [
    (SoftTarget(), both(6, 1), 'BinarySoftTarget'), (SoftTarget(), both(6), 'BinarySoftTarget'),
    (SoftTarget(), both(6), r'Logits'), (SoftTarget(), both(6, 1, 4, 4), 'BinarySoftTarget'),
    *[(SoftTarget(), dict(both(6, n), criterion=c), 'use Logits') for c,n in product(regressions, (1,4))],
    *[(SoftTarget(), dict(both(6, 4), criterion=c), 'use BinarySoftTarget') for c in yes_or_no],
    *[(BinarySoftTarget(), dict(both(6, 4), criterion=c), 'use SoftTarget') for c in one_of_several],
    (BinarySoftTarget(), dict(both(6, 1), criterion=MSELossFlat()), 'use Logits'),
    *[(l, dict(pred=z(6, 10), teacher_pred=z(6, 7)), r'\(6, 10\).*\(6, 7\).*Frozen\(teacher, classes=')
      for l in (SoftTarget(),BinarySoftTarget(),Logits())],
    (SoftTarget(), dict(pred=z(6, 10, 8, 8), teacher_pred=z(6, 10, 4, 4)), r'8, 8.*4, 4.*same size'),
    (SoftTarget(), dict(pred=z(6, 10), teacher_pred=z(5, 10)), r'\(6, 10\).*\(5, 10\)'),
    (FitNet(adapter=None), dict(fm_s=dict(a=z(2, 4, 8, 8)), fm_t=dict(a=z(2, 6, 8, 8))),
     r'\(2, 4, 8, 8\).*\(2, 6, 8, 8\).*adapter'),
    (FitNet(adapter=None), dict(fm_s=dict(a=z(2, 4, 8, 8), b=z(2, 4)), fm_t=dict(a=z(2, 4, 8, 8))),
     r"pairs 2 .*'a', 'b'.* with 1 "),
    (Attention(), dict(fm_s=dict(a=z(2, 35, 6)), fm_t=dict(a=z(2, 6, 4, 4))), r'\(2, 35, 6\).*without a grid')]

def soft(*shape, **kwargs): return dict(both(*shape), target=z(*shape).softmax(1), **kwargs)
def hard(*shape, **kwargs): return dict(both(*shape), target=torch.zeros(shape[0], *shape[2:]).long(), **kwargs)
two_labels = (torch.zeros(6).long(),torch.rand(6))
by_class = DKD(),NKD(),RLD(),AdjustedSoftTarget()
on_logits = *by_class,WSL(),DIST(),WTTM(),HardTarget(),Mutual()
refused += [
    *[(l, soft(6, 4), r'needs one class an item, \(B,\) integers') for l in (DKD(),RLD(),AdjustedSoftTarget())],
    *[(l, dict(both(6, 4), target=torch.rand(6)), 'one class an item|a class for each item')
      for l in (*by_class,WSL())],
    (AdjustedSoftTarget(), hard(6, 4, mix=two_labels), 'under MixUp and CutMix an item has two'),
    *[(l, hard(6, 4, 5, 5, mix=two_labels), 'without MixUp and CutMix') for l in (DKD(),NKD(),RLD(),WSL())],
    *[(l, hard(6, 4, criterion=c), f'use {n}') for l,(c,n) in product(
        on_logits, ((MSELossFlat(),'Logits'), (BCEWithLogitsLossFlat(),'BinarySoftTarget')))],
    *[(l, dict(hard(6, 4), teacher_pred=z(6, 5)), 'same classes are expected') for l in on_logits]]

def said(o):
    if isinstance(o, str): return o
    return name(o) if isinstance(o, nn.Module) else ''

@pytest.mark.parametrize('loss,given,match', refused, ids=said)
def test_refused(loss, given, match):
    with pytest.raises(ValueError, match=match): loss(**given)

def test_refused_arguments():
    for bad in (dict(map='mean'), dict(form='torch')):
        with pytest.raises(ValueError, match=repr(next(iter(bad.values())))): Attention(**bad)
    with pytest.raises(RuntimeError, match='build'):
        FitNet()(fm_s=dict(a=z(2, 4, 8, 8)), fm_t=dict(a=z(2, 6, 8, 8)))
