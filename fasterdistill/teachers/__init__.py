"What only teaches, and how one Learner's numbers become another's"
from .codes import *
from .ema import *
from .tables import *
from .teacher import *
