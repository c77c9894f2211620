"""Gate: the model has as many parameters as its record says, and no more than are allowed."""

from __future__ import annotations

from minitron_platform.gates.gate import Status, Subject, Verdict, at_most
from minitron_platform.tracking.variant_tags import kind_of
from minitron_platform.tracking.version_figures import number_in


def size(subject: Subject) -> list[Verdict]:
    parameters = subject.loaded.parameters
    if parameters is None:
        return []
    verdicts = []
    recorded = number_in(subject.version, "minitron.parameters")
    if kind_of(subject.version) == "quantised" and recorded is not None:
        parameters = round(recorded)  # transformers also counts scales, and packed weights as fewer
    elif recorded is not None:
        status: Status = "passed" if parameters == round(recorded) else "failed"
        verdicts.append(Verdict("parameters", status, f"{parameters:,}", f"{round(recorded):,} as registered"))
    if (limit := subject.settings.max_parameters) is not None:
        verdicts.append(at_most("size", parameters, limit, lambda value: f"{value:,.0f} parameters"))
    return verdicts
