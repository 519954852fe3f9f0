from numpy import ndarray

BLOCK_ROWS: int

def isa() -> str: ...
def set_threads(n: int) -> None: ...

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
    @property
    def step(self) -> int: ...

def gather_settled(
    rows: Rows, tables: SkipTables, ids: ndarray, out: ndarray, pick: ndarray | None = None
) -> None: ...
def settle_range(rows: Rows, tables: SkipTables, begin: int, end: int) -> None: ...
def refresh_spheres(rows: Rows, tables: SkipTables, begin: int, end: int) -> None: ...
def settle_and_step(
    rows: Rows,
    tables: SkipTables,
    ids: ndarray,
    grads: ndarray,
    lr: ndarray,
    pick: ndarray | None = None,
    forward: ndarray | None = None,
) -> None: ...
def update_blocks(
    spheres: ndarray,
    blocks: ndarray,
    n_rows: int,
    row_ids: ndarray | None = None,
    threads: int = 0,
) -> None: ...
def replace_spheres(
    spheres: ndarray, n_rows: int, ids: ndarray, values: ndarray, threads: int = 0
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
def copy_rows(rows: ndarray, source: ndarray, target: ndarray) -> None: ...
def permute_rows(rows: ndarray, order: ndarray) -> None: ...
def split_common(
    a: ndarray,
    b: ndarray,
    common_a: ndarray,
    common_b: ndarray,
    only_a: ndarray,
    only_b: ndarray,
) -> int: ...

class SlotTable:
    def __init__(self, n_slots: int, n_rows: int) -> None: ...
    @property
    def n_slots(self) -> int: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def in_use(self) -> int: ...
    def expect(self, ids: ndarray, view: int) -> None: ...
    def plan(
        self,
        ids: ndarray,
        view: int,
        protect_from: int,
        slots: ndarray,
        moves: ndarray,
    ) -> tuple[int, int] | None: ...
    def lookup(self, ids: ndarray, slots: ndarray) -> int: ...
    def residents(self, rows: ndarray, slots: ndarray) -> int: ...
    def clear(self, n_rows: int | None = None) -> None: ...
