"""How the attention kernels are launched: tile sizes, splits, warps. The rules, and the numbers to tune, in one place.

A launch depends on a layer's geometry and on a step's size class (see device_step), never on lengths: a graph that was
recorded for a class fits every step of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from verifier.probe import LayerGeometry


@dataclass(frozen=True, slots=True)
class Tuning:
    """Numbers for one kind of device; the defaults are reasoned for Hopper (132 SMs, 228 KiB shared memory), not tuned.

    A decode tile has few lines, is bound by memory and wants several programs on an SM. A tile of 128 lines fills the
    registers of an SM. Splits cost a write and a read of partial sums, so a split has at least `min_keys`
    keys, and 2 for each line of its tile: what it writes is then at most half of what it reads in bfloat16.
    """

    num_multiprocessors: int = 132
    max_lines: int = 128
    """Most lines (queries times heads of a group) of one tile, for keys and values of up to 256 bytes."""
    max_float32_lines: int = 32
    """Products of float32 use no tensor cores and live in registers: larger tiles spill."""
    tile_keys: int = 64
    """Most keys of one tile, for keys and values of up to 256 bytes: keys and values in flight are then 32 KiB."""
    num_stages: int = 3
    """Of the loads of keys and values of up to 256 bytes."""
    grid_per_multiprocessor: int = 16
    """Programs launched at most for the sake of splitting: those that find no keys end at once, but are not free."""
    min_keys: int = 128
    max_splits: int = 64
    scratch_bytes: int = 64 * 2**20
    combine_lines: int = 8

    @classmethod
    def of(cls, num_multiprocessors: int, shared_bytes: int) -> Tuning:
        """For a device whose multiprocessors have so much shared memory.

        That tells the kinds apart: 228 KiB on Hopper and Blackwell, 164 on an A100, where a tile of 128 lines would
        spill, 100 on smaller cards, which have no room for three stages.
        """
        is_small, is_large = shared_bytes < 128 * 1024, shared_bytes > 200 * 1024
        return cls(num_multiprocessors, max_lines=128 if is_large else 64, num_stages=2 if is_small else 3)


@dataclass(frozen=True, slots=True)
class Launch:
    """The constants of one launch of the attention kernels."""

    num_items: int
    """Query blocks, as many as the class can need."""
    block_q: int
    """Queries of a tile."""
    block_m: int
    """Lines of a tile, a power of two >= block_q * fold."""
    block_n: int
    """Keys of a tile."""
    k_pad: int
    v_pad: int
    num_splits: int
    num_programs: int
    """How many programs fill the device: work is shared out so that about as many find something to do."""
    min_keys: int
    block_r: int
    num_warps: int
    num_stages: int


def power_of_two(least: int) -> int:
    """The smallest power of two that is >= least."""
    return 1 << max(0, least - 1).bit_length()


def make_launch(
    geometry: LayerGeometry,
    size: tuple[int, int, int],
    itemsize: int,
    tuning: Tuning,
) -> Launch:
    """The launch for one kind of layer.

    Args: `size` = positions of this pass, and the bounds of the step's class on positions and on segments; `itemsize`
        in bytes of K/V.
    """
    num_positions, most_positions, most_segments = size
    fold = geometry.num_heads // geometry.num_kv_heads
    k_pad, v_pad = max(16, power_of_two(geometry.k_dim)), max(16, power_of_two(geometry.v_dim))
    widest = max(k_pad, v_pad)
    usual = -(-most_positions // most_segments)  # positions of a segment
    most_lines = max(16, min(tuning.max_lines, tuning.max_lines * 256 // (widest * itemsize)))
    if itemsize == 4:
        most_lines = min(most_lines, tuning.max_float32_lines)
    block_m = max(min(power_of_two(usual * fold), most_lines), power_of_two(fold), 16)
    block_q = block_m // fold
    room = (most_segments + 1) * (block_q - 1)  # the positions behind the last segment count as one more
    num_items = (num_positions + room) // block_q
    most_items = max(num_items, (most_positions + room) // block_q)
    # As the registers allow: tests.bench.compile_kernels prints them.
    per_multiprocessor = 3 if block_m <= 16 else 2 if block_m <= 64 else 1
    return Launch(
        num_items=num_items,
        block_q=block_q,
        block_m=block_m,
        block_n=max(16, min(tuning.tile_keys, tuning.tile_keys * 256 // power_of_two(widest * itemsize))),
        k_pad=k_pad,
        v_pad=v_pad,
        num_splits=_splits(most_items * geometry.num_kv_heads, block_m * geometry.v_dim * 4, tuning),
        num_programs=per_multiprocessor * tuning.num_multiprocessors,
        min_keys=max(tuning.min_keys, 2 * block_m),
        block_r=min(tuning.combine_lines, block_m),
        num_warps=8 if block_m >= 128 or block_m * v_pad * itemsize >= 128 * 256 else 4,
        num_stages=tuning.num_stages if widest * itemsize <= 256 else 2,
    )


def _splits(num_tiles: int, tile_bytes: int, tuning: Tuning) -> int:
    """The most splits, a power of two, that scratch memory and the bound on idle programs allow."""
    splits = 1
    while (
        2 * splits <= tuning.max_splits
        and num_tiles * 2 * splits <= tuning.grid_per_multiprocessor * tuning.num_multiprocessors
        and num_tiles * 2 * splits * tile_bytes <= tuning.scratch_bytes
    ):
        splits *= 2
    return splits
