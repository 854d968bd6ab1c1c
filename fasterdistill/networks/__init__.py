"Any network, read and run without changing it"
from .as_it_was import *
from .record import *
from .layouts import *
from .precision import *
from .stages import *
from .names import *
from .taps import *
from .rehearsal import *
from .cuts import *
from .net import *
from .adapters import *
from .bifpn import *
