"""C++ core. Tensors are ``(address, batch stride, head stride, length stride)`` in elements."""

_Dims = tuple[int, int, int, int, int, int, int]
"""batch, heads_q, heads_kv, length_q, length_k, head_dim, head_dim_v"""
_Tensor = tuple[int, int, int, int]
_Operand = tuple[int, str, tuple[int, int, int, int]]
"""Address, dtype and strides (batch, head, query, key), 0 where one entry holds for all."""

EMPTY_TILE: int
LIVE_TILE: int
LIST_CAPACITY: int
OPENMP: bool
SAVED_ALIGNMENT: int
TILE_ROWS: int

def usable_isas() -> list[str]: ...
def isa() -> str: ...
def are_decoded(queries: int, keys: int, head_dim: int) -> bool: ...
def saved_bytes(dtype: str, rows: int, entries: int) -> int: ...
def fail_in_parallel(tasks: int, threads: int, failing: int) -> int: ...

class Work:
    """What forwards did, added up; see types.h."""

    def __init__(self) -> None: ...
    @property
    def tiles(self) -> int: ...
    @property
    def appended(self) -> int: ...
    @property
    def tightenings(self) -> int: ...
    @property
    def solved(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def flat_rows(self) -> int: ...

class Kept:
    @property
    def bytes(self) -> int: ...
    def save(self, address: int) -> None: ...

def attention_forward(
    dims: _Dims,
    dtype: str,
    alpha: float,
    scale: float,
    is_causal: bool,
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    threads: int,
    isa: str,
    out: _Tensor,
    tau: int,
    keep: bool,
    scan_rows: int,
    support: int = 0,
    iterations: int = 0,
    tiles: int = 0,
    work: Work | None = None,
    window: tuple[int, int] = (-1, -1),
    shift: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    operands: dict[str, _Operand] = {},
    block_table: tuple[int, int, int, int] | None = None,
) -> Kept | None:
    """With a ``block_table`` (address of int32 ``(batch, pages)`` with unit stride, batch stride,
    rows of a page, pages of the cache) the batch strides of ``key`` and ``value`` are those of
    pages, and ``length_k`` is at most what the table's pages hold. It is for calls without
    gradients or statistics."""

def attention_backward(
    dims: _Dims,
    dtype: str,
    alpha: float,
    scale: float,
    is_causal: bool,
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    threads: int,
    isa: str,
    grad_out: _Tensor,
    grad_query: _Tensor,
    grad_key: _Tensor,
    grad_value: _Tensor,
    saved: int,
    saved_bytes: int,
    window: tuple[int, int] = (-1, -1),
    shift: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    operands: dict[str, _Operand] = {},
    gradients: dict[str, _Operand] = {},
) -> int:
    """In how many turns, of some key heads each, it was done."""

def entmax_forward(
    rows: int,
    length: int,
    dtype: str,
    alpha: float,
    x: int,
    stride_x: int,
    y: int,
    threads: int,
    isa: str,
    alphas: int = 0,
) -> None: ...
def entmax_backward(
    rows: int,
    length: int,
    dtype: str,
    alpha: float,
    y: int,
    grad_y: int,
    stride_grad_y: int,
    grad_x: int,
    threads: int,
    isa: str,
    alphas: int = 0,
) -> None: ...
