"""Running a cell over a sequence: the call, its checks, and the choice of a backend."""

from rnncore.sequence.call import States as States
from rnncore.sequence.call import explain_backend as explain_backend
from rnncore.sequence.call import unroll as unroll
from rnncore.sequence.choices import BackendChoice as BackendChoice
from rnncore.sequence.choices import BackendChoices as BackendChoices
