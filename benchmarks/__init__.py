"""Side-by-side runs of gsscale and splatfacto, and the page of results that they give.

``compare.py`` measures, ``merge.py`` joins files measured separately, ``report.py`` writes
``docs/benchmarks.md``. The other modules are what these three are made of.
"""
