from numpy import ndarray

BLOCK_ROWS: int

def isa() -> str: ...

class Rows:
    def __init__(
        self,
        params: ndarray,
        exp_avg: ndarray,
        exp_avg_sq: ndarray,
        spheres: ndarray | None,
        columns: ndarray,
    ) -> None: ...

class SkipTables:
    def __init__(
        self,
        step: int,
        skip: ndarray,
        tail: ndarray,
        eps_scale: ndarray,
        decay1: ndarray,
        decay2: ndarray,
        eps: ndarray,
        reach: ndarray,
        group: ndarray,
        beta1: float,
        beta2: float,
    ) -> None: ...

def gather_settled(rows: Rows, tables: SkipTables, ids: ndarray, out: ndarray) -> None: ...
def settle_range(rows: Rows, tables: SkipTables, begin: int, end: int) -> None: ...
def refresh_spheres(rows: Rows, tables: SkipTables, begin: int, end: int) -> None: ...
def settle_and_step(
    rows: Rows, tables: SkipTables, ids: ndarray, grads: ndarray, lr: ndarray
) -> None: ...
def update_blocks(
    spheres: ndarray,
    blocks: ndarray,
    n_rows: int,
    row_ids: ndarray | None = None,
    threads: int = 0,
) -> None: ...
def cull(
    spheres: ndarray,
    blocks: ndarray,
    n_rows: int,
    planes: ndarray,
    out: ndarray,
    threads: int = 0,
) -> int: ...
def morton_codes(rows: ndarray, column: int, n: int, box: ndarray, out: ndarray) -> None: ...
def permute_rows(rows: ndarray, order: ndarray) -> None: ...
