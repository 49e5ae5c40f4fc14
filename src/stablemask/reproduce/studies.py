"""All studies by name, in the order they are run and told."""

from .cost import STUDY as COST
from .extrapolation import STUDY as EXTRAPOLATION
from .language import STUDY as LANGUAGE
from .position import STUDY as POSITION
from .sinks import STUDY as SINKS
from .theory import STUDY as THEORY

STUDIES = {study.name: study for study in (THEORY, POSITION, LANGUAGE, EXTRAPOLATION, SINKS, COST)}
