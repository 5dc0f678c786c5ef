"""The Triton kernels. Importing one imports Triton, so only ``launch.py`` and ``rows.py`` do."""
