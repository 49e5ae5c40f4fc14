"""The paper's claims as studies: what each measures, and the page that says what came out.

Read ``study.py`` first, then any study, say ``position.py``; ``runner.py`` runs them.
"""

from .page import differing_verdicts, load_documents, write_page
from .runner import Stopped, run_studies
from .study import Claim, Job, Section, Study

PAGE = "page"

__all__ = [
    "PAGE",
    "Claim",
    "Job",
    "Section",
    "Stopped",
    "Study",
    "differing_verdicts",
    "load_documents",
    "run_studies",
    "write_page",
]
