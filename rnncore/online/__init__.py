"""Online learning: gradients at every step, forward in time, without storing the past."""

from rnncore.online.exact import RTRL as RTRL
from rnncore.online.exact import SnAp as SnAp
from rnncore.online.kronecker import KFRTRL as KFRTRL
from rnncore.online.learning import OnlineInput as OnlineInput
from rnncore.online.learning import OnlineState as OnlineState
from rnncore.online.learning import feedback as feedback
from rnncore.online.learning import online_update as online_update
from rnncore.online.own_unit import RFLO as RFLO
from rnncore.online.own_unit import EProp as EProp
from rnncore.online.own_unit import SnAp1 as SnAp1
from rnncore.online.rule import Memory as Memory
from rnncore.online.rule import Rule as Rule
from rnncore.online.uoro import UORO as UORO
