"""The backends, one package each; see :mod:`adasplash2.contract` for what each one has."""

REGISTRY: dict[str, str] = {
    # name: module, in the order in which the dispatcher asks them without measurements
    "cuda": "adasplash2.backends.cuda",
    "triton": "adasplash2.backends.triton",
    "cpu": "adasplash2.backends.cpu",
}
