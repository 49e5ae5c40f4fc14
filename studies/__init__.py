"""The paper's claims as studies: what each measures, and the page that says what came out.

    python -m studies [STUDY ...]

Read ``study.py`` first, then any study, say ``position.py``; ``runner.py`` runs them, ``command.py`` has the
options. They are run from a clone and are no part of the installed package.
"""
