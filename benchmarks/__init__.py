"""Side-by-side runs of gsscale and splatfacto, and the page of results that they give.

``compare.py`` measures, ``merge.py`` joins files measured separately, ``report.py`` writes
``docs/benchmarks.md``. ``step.py`` measures a training step at a fixed number of Gaussians and
``rows.py`` the kernels beneath it. The other modules are what these are made of.
"""
