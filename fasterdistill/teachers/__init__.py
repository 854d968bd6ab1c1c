"What only teaches"
from .teacher import *
