"""Settings of every test: the hypothesis profile, by the environment variable HYPOTHESIS_PROFILE (``ci`` or ``nightly``); and
Triton's interpreter, which has to be chosen before anything imports triton (what is compiled ahead of time is compiled in a
process of its own).
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
