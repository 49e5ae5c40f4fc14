"""All studies by name, in the order they are run and told."""

from . import cost, extrapolation, language, position, sinks, theory

STUDIES = {
    module.STUDY.name: module.STUDY
    for module in (theory, position, language, extrapolation, sinks, cost)
}
