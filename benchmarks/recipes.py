"""Every method of the library as its paper or code uses it: one line each, to be pasted.

A recipe gets the number of epochs, as what a paper lets grow over its first 20 of 240 does so over the same; `peer`
is a network like the student, untrained, `head` what `fit_head` made for the teacher."""
import inspect

from fasterdistill.all import (BYOT,CC,CRD,CSKD,DDGSD,DIST,DKD,DML,FCFD,FRSKD,FRSKDSLA,FSP,HCL,NKD,NST,
                               OFA,OFD,PKT,RKD,RLD,SAD,SLA,SP,SRD,SSKD,TAS,USKD,VID,WKD,WSL,WTTM,
                               ActivationBoundaries,AdjustedSoftTarget,Attention,Cosine,DeepSupervision,FitNet,
                               GradientAttention,HardTarget,InfoNCE,Logits,Mutual,OFALogits,ReviewKD,SimKD,
                               SoftTarget,TaskLoss,hint,ramp,steps)


def part(epochs, n, of=240):
    "As many of `epochs` as `n` are of the paper's"
    return max(round(epochs*n/of), 1)

def two_phases(first, epochs):
    "The first 30 epochs of the paper's 240 for `first`, then the labels alone"
    n = part(epochs, 30)
    return steps({0:0, n:1})*TaskLoss() + steps({0:1, n:0})*first

recipes = {
    'SoftTarget': lambda n: .1*TaskLoss() + .9*SoftTarget(T=4),
    'Logits': lambda n: TaskLoss() + Logits(),
    'DKD': lambda n: TaskLoss() + ramp(part(n, 20))*DKD(alpha=1, beta=8, T=4),
    'OFA': lambda n: TaskLoss() + OFA(),
    'OFALogits': lambda n: TaskLoss() + OFALogits(),
    'NKD': lambda n: TaskLoss() + NKD(gamma=3.5, T=3),
    'DIST': lambda n: TaskLoss() + DIST(beta=1, gamma=1, tau=1),
    'RLD': lambda n: TaskLoss() + ramp(part(n, 20))*RLD(alpha=1, beta=8, T=4, alpha_T=1),
    'WTTM': lambda n: TaskLoss() + 4*WTTM(gamma=.2),
    'WSL': lambda n: TaskLoss() + 2.5*WSL(T=2),
    'AdjustedSoftTarget': lambda n: .1*TaskLoss() + .9*AdjustedSoftTarget(T=4, adjust='swap', dynamic='flsw'),
    'HardTarget': lambda n: .5*TaskLoss() + .5*HardTarget(),
    'Mutual': lambda n: TaskLoss() + Mutual(),
    'Attention': lambda n: TaskLoss() + 1000*Attention(),
    'FitNet': lambda n: TaskLoss() + 100*FitNet(adapter=hint).at('layer2'),
    'NST': lambda n: TaskLoss() + 50*NST(),
    'FSP': lambda n: two_phases(FSP(), n),
    'VID': lambda n: TaskLoss() + VID(),
    'ActivationBoundaries': lambda n: two_phases(.003*ActivationBoundaries(), n),
    'OFD': lambda n: TaskLoss() + .001*OFD(),
    'HCL': lambda n: TaskLoss() + HCL(),
    'ReviewKD': lambda n: TaskLoss() + ramp(part(n, 20))*ReviewKD(),
    'SimKD': lambda n: SimKD(),
    'FCFD': lambda n: TaskLoss() + FCFD(warmup=part(n, 20)),
    'InfoNCE': lambda n: TaskLoss() + InfoNCE(),
    'RKD': lambda n: TaskLoss() + RKD(distance=25, angle=50),
    'SP': lambda n: TaskLoss() + 3000*SP(),
    'PKT': lambda n: TaskLoss() + 30000*PKT(),
    'CC': lambda n: TaskLoss() + .02*CC(),
    'SRD': lambda n: TaskLoss() + SoftTarget(T=1) + 2*SRD(),
    'Cosine': lambda n: TaskLoss() + Cosine(),
    'WKD': lambda n: TaskLoss() + .08*WKD(),
    'GradientAttention': lambda n: TaskLoss() + GradientAttention(),
    'CRD': lambda n: TaskLoss() + .8*CRD(),
    'SSKD': lambda n, head: .1*TaskLoss() + SSKD(head),
    'SAD': lambda n: TaskLoss() + .1*SAD(),
    'BYOT': lambda n: TaskLoss() + BYOT(),
    'DeepSupervision': lambda n: TaskLoss() + DeepSupervision(),
    'FRSKD': lambda n: TaskLoss() + FRSKD(alpha=2, beta=100),
    'SLA': lambda n: TaskLoss() + SLA(),
    'FRSKDSLA': lambda n: TaskLoss() + FRSKDSLA(alpha=2, beta=100),
    'USKD': lambda n: TaskLoss() + USKD(alpha=.1, mu=.1),
    'CSKD': lambda n: TaskLoss() + CSKD(),
    'DDGSD': lambda n: .5*TaskLoss() + DDGSD(),
    'TAS': lambda n: TaskLoss() + TAS(),
    'DML': lambda n, peer: TaskLoss() + DML(peer),
}

def recipe(name, epochs, **makes):
    "The loss, with what else it needs made by the functions `makes`"
    f = recipes[name]
    return f(epochs, **{k: makes[k]() for k in inspect.signature(f).parameters if k in makes})
