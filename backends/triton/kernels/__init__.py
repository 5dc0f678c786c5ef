"""The Triton kernels. Importing one imports Triton, so only ``launch.py`` and ``rows.py`` do.

Functions of another file are called as ``work.head_of``; constants are imported by their name:
Triton's disk cache sees the value of a name, and of an attribute it sees none.
"""
