"""The Triton kernels. Importing one imports Triton, so only ``launch.py`` and ``rows.py`` do.

Functions of a file are called by its name, as ``work.head_of``, but for files that use few or whose
locals have that name: these import them. Constants are always imported by their own name: of that
Triton's disk cache sees the value, of an attribute it sees none.
"""
