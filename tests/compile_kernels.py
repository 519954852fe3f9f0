"""Compile every Triton kernel for a GPU that need not be there; run as a script.

    python tests/compile_kernels.py 90

Prints a line per kernel: its name, and the bytes of machine code.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gsscale_nerfstudio.engines import kernels, noise_kernels, slot_kernels, staging_kernels
from gsscale_nerfstudio.loss import FUSED, fused
from gsscale_nerfstudio.rasterize import gradients, quarters, tile_lists

POINTERS = {
    **dict.fromkeys(["slots", "rows_of", "moves", "positions", "add_at", "group_of"], "*i32"),
    **dict.fromkeys(["pixel_radii", "counts", "gaussians", "begins", "marked"], "*i32"),
    **dict.fromkeys(["in_squares", "in_tiles"], "*i32"),
    **dict.fromkeys(["order", "ends"], "*i64"),
    "sums": "*fp64",
    "squares": "*i16",
}
INTEGERS = {
    "n",
    "n_rows",
    "total",
    "bands_end",
    "step",
    "height",
    "width",
    "first_square",
    "square_columns",
    "n_pairs",
    "n_tiles",
}
FLOATS = {
    "log2_beta1",
    "log2_beta2",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "inv_sqrt_bias2",
    "deviation",
    "l1_weight",
    "most",
    "room",
    "scale_weight",
    "opacity_weight",
    "m_share",
    "v_decay",
    "pull_reach",
    "ssim_weight",
}
ROWS = {
    "SH": 11,
    "DEGREE": 3,
    "SLOPES": True,
    "HORIZON": 264,
    "GROUPS": 8,
    "WIDTH": 64,
    "COLUMNS": 64,
    "STAMP": 59,
    "GRAD2D": 60,
    "COUNT": 61,
    "MAX_RADIUS": 62,
    "KEY": 63,
    "NOISE": False,
    "PULL": False,
    "ROWS": 16,
}
SLOTS = {
    **{name: ROWS[name] for name in ("STAMP", "GRAD2D", "COUNT", "MAX_RADIUS", "HORIZON", "WIDTH")},
    "SCALE": 3,
    "OPACITY": 10,
    "SCALES": 1,
    "OPACITIES": 3,
    "N_GROUPS": 8,
    "SLOTS": 128,
}
NOISE = {**ROWS, "KEY": 63, "N_GROUPS": 8, "ROWS": 128}
PARTS = {
    "TILE": 8,
    "WIDE": gradients.WIDE,
    "PIXELS": gradients.PIXELS,
    "CHUNK": gradients.CHUNK,
    "CHANNELS": 3,
}
TILES = {"RADII": 1, "BLOCK": 32}
LOSS = {"ROWS": fused.TILE[0], "COLUMNS": fused.TILE[1]}
KERNELS = [
    (kernels.exchange_rows, ROWS),
    (kernels.gather_leaves, {**ROWS, "FROM_HOST": False}),
    (kernels.gather_leaves, {**ROWS, "FROM_HOST": True, "NOISE": True, "PULL": True}),
    (kernels.settle_and_step_rows, {**ROWS, "HAS_STATISTICS": True}),
    (kernels.exchange_rows, {**ROWS, "NARROW": True}),
    (kernels.gather_leaves, {**ROWS, "FROM_HOST": True, "NARROW": True}),
    (kernels.settle_and_step_rows, {**ROWS, "HAS_STATISTICS": True, "NARROW": True, "PULL": True}),
    (noise_kernels._draw, {**NOISE, "FROM_HOST": True, "DRAW_OWN": True, "PULL": True}),
    (noise_kernels._step, NOISE),
    (noise_kernels._step, {**NOISE, "NARROW": True}),
    (staging_kernels.pack_gradients, {**ROWS, "HAS_STATISTICS": True, "ADD": False}),
    (staging_kernels.pack_gradients, {**ROWS, "HAS_STATISTICS": False, "ADD": True}),
    (staging_kernels.unpack_rows, {**ROWS, "SCATTER": True}),
    (slot_kernels._summarize, SLOTS),
    (slot_kernels._limit, SLOTS),
    (slot_kernels._limit, {**SLOTS, "NARROW": True}),
    (tile_lists._count_tiles, TILES),
    (gradients._gradients, {**PARTS, "ABSOLUTE": False}),
    (gradients._gradients, {**PARTS, "CHANNELS": 4, "ABSOLUTE": True}),
    (tile_lists._list_squares, {**TILES, "RADII": 2}),
    (quarters._count, {"CHUNK": quarters._CHUNK}),
    (quarters._split, {"CHUNK": quarters._CHUNK}),
]
if FUSED:
    KERNELS += [
        (fused._forward_kernel, {**LOSS, "STORE_MAPS": True}),
        (fused._backward_kernel, LOSS),
    ]


def type_of(name: str, kernel: Any, narrow: bool = False) -> str:
    if narrow and name.split("_")[-1] in ("m", "v") and not name.startswith("one_minus"):
        return "*i16"
    if name in INTEGERS or name.endswith("stride"):
        return "i32"
    if name in FLOATS:
        return "fp32"
    if name in ("rows", "columns") and kernel in (
        tile_lists._count_tiles,
        tile_lists._list_squares,
        quarters._count,
        quarters._split,
        gradients._gradients,
    ):
        return "i32"
    # unpack_rows calls its rows `rows`; they are floats there, and ids in gather_leaves.
    readers = (kernels.gather_leaves, slot_kernels._summarize, noise_kernels._draw)
    if name == "rows" and kernel in readers:
        return "*i32"
    of_lists = (gradients._gradients, quarters._count, quarters._split)
    if name == "offsets" and kernel in of_lists:  # elsewhere, of noise
        return "*i32"
    if name == "squares" and kernel in of_lists:
        return "i32"
    return POINTERS.get(name, "*fp32")


def compile_kernel(kernel: Any, constants: dict[str, Any], capability: int) -> int:
    narrow = constants.get("NARROW", False)
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in constants else type_of(name, kernel, narrow) for name in names
    }
    if "constexprs" in inspect.signature(ASTSource).parameters:
        of = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=of)
    else:  # Triton up to 3.1, of PyTorch up to 2.5
        others = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        source = ASTSource(fn=kernel, signature=others, constants=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return len(compiled.asm["cubin"])


if __name__ == "__main__":
    for kernel, constants in KERNELS:
        print(kernel.__name__, compile_kernel(kernel, constants, int(sys.argv[1])))
