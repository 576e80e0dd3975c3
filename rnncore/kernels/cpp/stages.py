"""An update that takes means over the units of a head, written in stages: `mean_over_units` of `cells.reductions`.

A stage is elementwise, on one vector of units, and the means that it takes are known to all units in the next one; what
is needed in a later stage than it is formed in is held in between.  The transpose of such an update has the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rnncore import _compat
from rnncore.cells.reductions import MEAN
from rnncore.kernels import emit, kernel_body


def reduces(part: kernel_body.Body) -> bool:
    """Whether the update takes means over units."""
    return any(eqn.primitive.name == MEAN for eqn in part.with_sums.jaxpr.eqns)


def lines(part: kernel_body.Body, language: emit.Language) -> list[str]:
    """The structs `Updating`, `Keeping` and `Transposing`: the functions of `struct Cell` in stages."""
    names = {"forward": "Updating", "keep": "Keeping", "backward": "Transposing"}
    found = []
    for name, closed, inputs, outputs in emit.functions(part):
        found += [f"  struct {names[name]} {{", *_struct(closed, inputs, outputs, part.dtype, language), "  };"]
    return found


def _struct(
    closed: Any, inputs: emit.Names, outputs: emit.Names, dtype: str, language: emit.Language
) -> list[str]:  # fmt: skip
    jaxpr = closed.jaxpr
    writer = emit.Writer(closed, inputs, dtype, language)
    level = dict.fromkeys((*jaxpr.constvars, *jaxpr.invars), 0)  # the first stage in which a value is known

    def known(values: Sequence[Any]) -> int:
        return max((level[v] for v in values if not isinstance(v, _compat.Literal)), default=0)

    formed = {}  # the stage of each equation
    for eqn in jaxpr.eqns:
        formed[id(eqn)] = known(eqn.invars)
        level[eqn.outvars[0]] = formed[id(eqn)] + (eqn.primitive.name == MEAN)
    last = max(level.values())
    means = sorted((e for e in jaxpr.eqns if e.primitive.name == MEAN), key=lambda e: formed[id(e)])
    writer.env |= {e.outvars[0]: f"means[{n}]" for n, e in enumerate(means)}

    # What is read in a later stage than it is formed in.
    own = {e.outvars[0] for e in jaxpr.eqns if e.primitive.name != MEAN}
    reads = [(v, formed[id(e)]) for e in jaxpr.eqns for v in e.invars] + [(v, last) for v in jaxpr.outvars]
    late = [(v, at) for v, at in reads if not isinstance(v, _compat.Literal) and v in own and level[v] < at]
    held = {v: n for n, v in enumerate(dict.fromkeys(v for v, _ in late))}

    parameters = [f"const vec* {what}" for what, _ in inputs] + [f"vec* {what}" for what, _ in outputs]
    parameters += ["vec* held", "const vec* means", "mask there", "vec* sums"]
    known_at = [sum(formed[id(e)] < stage for e in means) for stage in range(last + 1)]
    found = [
        f"static constexpr int stages = {last + 1}, means = {len(means)}, held = {len(held)};",
        f"static constexpr int known[stages] = {{{', '.join(map(str, known_at))}}};  // means, when a stage begins",
        "template <int Stage>",
        f"{language.qualifier} void at({', '.join(parameters)}) {{",
    ]
    numbers = {id(e): n for n, e in enumerate(means)}
    for stage in range(last + 1):
        found.append(f"  if constexpr (Stage == {stage}) {{")
        here = [e for e in jaxpr.eqns if formed[id(e)] == stage]
        for v in dict.fromkeys(v for v, at in late if at == stage):
            kind, value = writer.kinds[v], f"held[{held[v]}]"
            value = value if kind == "vec" else language.bitcast(kind, value)
            found.append(f"    const {kind} {writer.env[v]} = {value};")
        for eqn in here:
            if eqn.primitive.name == MEAN:
                n = numbers[id(eqn)]
                found.append(f"    sums[{n}] += select(there, {writer.read(eqn.invars[0])}, all(0));")
                continue
            found.append("    " + writer.line(eqn))
            v = eqn.outvars[0]
            if v in held:
                value = writer.env[v] if writer.kinds[v] == "vec" else language.bitcast("vec", writer.env[v])
                found.append(f"    held[{held[v]}] = {value};")
        if stage == last:
            found += ["    " + line for line in writer.results(outputs, jaxpr.outvars)]
        found.append("  }")
    return ["    " + line for line in [*found, "}"]]
