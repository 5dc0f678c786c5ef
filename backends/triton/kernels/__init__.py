"""The Triton kernels. Importing one imports Triton, so only ``launch.py`` and ``rows.py`` do.

Functions of ``score`` and ``work`` are called by their module, as ``work.head_of``, where this says
more than their names do. Constants are imported by their name: of a name Triton's disk cache sees
the value, of an attribute it sees none.
"""
