"""Attention by kernels of ours over pages: a row's keys are read once for all its nodes and all heads that share them.

The kernels lie in kernels/, the launch rules in launch.py. Everything that differs from step to step is read from
device memory at fixed addresses, so a recorded launch can be replayed for any step of the same size class.
"""

from __future__ import annotations

from typing import Any

import torch

from verifier.attention import LayerKV
from verifier.cuda.kernels import OPTIONS
from verifier.cuda.kernels.attend import attend_kernel
from verifier.cuda.kernels.combine import combine_kernel
from verifier.cuda.kernels.scatter import scatter
from verifier.cuda.launch import Launch, Tuning, make_launch
from verifier.cuda.segments import DeviceStep, StepUploads
from verifier.model import KV_ATTRIBUTE, AttentionInputs
from verifier.probe import LayerGeometry
from verifier.step import PackedStep, StepBuffers

_CPU_TUNING = Tuning(
    2, max_lines=64, tile_keys=256, grid_per_multiprocessor=8, min_keys=16, max_splits=4, combine_lines=64
)
"""For the interpreter: small steps still take every path."""


class TritonAttention:
    """Owns the step's arrays on the device, and the scratch memory for partial sums."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning
        self._uploads = StepUploads()
        self._scratch: torch.Tensor | None = None  # float32

    def plan(self, step: PackedStep, size: tuple[int, int] | None = None) -> PlannedTriton:
        """Bring the step's arrays to the device: one small copy, two where pages have changed.

        Args: `size` names a larger class than the step's own, as a recording may need.
        """
        return PlannedTriton(self, step.write_slots, step.page_size, self._uploads.take(step, size))

    def plan_nothing(self, size: tuple[int, int], buffers: StepBuffers, write_slots: torch.Tensor) -> PlannedTriton:
        """Attention over a class of steps, to be recorded: its arrays hold padding until a step is planned.

        Args: `size` = most positions and segments; `write_slots` [N] int64 will hold those of the steps to come.
        """
        table = buffers.page_table.shape
        arrays = self._uploads.of(size, (table[0], table[1]), write_slots.device)
        arrays.clear()
        return PlannedTriton(self, write_slots, buffers.page_size, arrays.arrays)

    def tuning(self, device: torch.device) -> Tuning:
        """The numbers for `device`, unless the back end was made with its own."""
        if self._tuning is None:
            self._tuning = _CPU_TUNING
            if device.type == "cuda":
                found = torch.cuda.get_device_properties(device)
                self._tuning = Tuning.of(found.multi_processor_count, found.shared_memory_per_multiprocessor)
        return self._tuning

    def scratch(self, numbers: int, device: torch.device) -> torch.Tensor:
        """Room for `numbers` float32: allocated once, as large as any launch may ask for."""
        if self._scratch is None:
            # Tops and totals beside the partial sums: two numbers to a line of at least 8.
            most = self.tuning(device).scratch_bytes // 4
            self._scratch = torch.empty(most + most // 4, dtype=torch.float32, device=device)
        assert numbers <= self._scratch.shape[0], f"scratch of {self._scratch.shape[0]} numbers, {numbers} needed"
        return self._scratch


class PlannedTriton:
    """Attention of one step; valid until the next one of its size class is planned."""

    def __init__(self, owner: TritonAttention, write_slots: torch.Tensor, page_size: int, arrays: DeviceStep) -> None:
        self._owner = owner
        self._write_slots = write_slots
        self._page_size = page_size
        self._arrays = arrays
        self._launches: dict[LayerGeometry, Launch] = {}

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]; N may be padded beyond the step's positions."""
        layer: LayerKV = getattr(inputs.module, KV_ATTRIBUTE)
        scatter(inputs.key[0], inputs.value[0], self._write_slots, layer.k, layer.v)
        geometry = layer.geometry
        query = inputs.query[0]  # [heads, N, k_dim]
        query = query if query.stride(2) == 1 else query.contiguous()
        num_positions = query.shape[1]
        launch = self._launch(geometry, num_positions, query)
        out = query.new_empty((1, num_positions, geometry.num_heads, geometry.v_dim))
        self._run(query, out, layer, inputs.sinks, launch)
        return out

    def _launch(self, geometry: LayerGeometry, num_positions: int, query: torch.Tensor) -> Launch:
        """Layers of one kind share a launch; within a step the number of positions is the same for all."""
        if geometry not in self._launches:
            size = (num_positions, self._arrays.most_positions, self._arrays.most_segments)
            tuning = self._owner.tuning(query.device)
            self._launches[geometry] = make_launch(geometry, size, query.element_size(), tuning)
        return self._launches[geometry]

    def _run(
        self,
        query: torch.Tensor,  # [heads, N, k_dim]
        out: torch.Tensor,  # [1, N, heads, v_dim]
        layer: LayerKV,
        sinks: torch.Tensor | None,  # [heads]
        launch: Launch,
    ) -> None:
        arrays, geometry = self._arrays, layer.geometry
        scratch = self._split_scratch(launch, geometry, query.device)
        constants = self._constants(query, geometry, launch)
        attend_kernel[(launch.num_items, geometry.num_kv_heads, launch.num_splits)](
            query,
            layer.k,
            layer.v,
            out,
            out if sinks is None else sinks,
            *scratch,
            arrays.header,
            arrays.starts,
            arrays.rows,
            arrays.prefix_lens,
            arrays.depths,
            arrays.ancestors,
            arrays.page_table,
            query_stride=query.stride(1),
            head_stride=query.stride(0),
            key_stride=layer.k.stride(0),
            value_stride=layer.v.stride(0),
            key_head_stride=layer.k.stride(1),
            value_head_stride=layer.v.stride(1),
            page_stride=arrays.page_table.stride(0),
            scaling=geometry.scaling,
            softcap=geometry.softcap or 0.0,
            has_sinks=sinks is not None,
            k_dim=geometry.k_dim,
            k_pad=launch.k_pad,
            page_size=self._page_size,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **constants,
        )
        if launch.num_splits > 1:
            combine_kernel[(launch.num_items, geometry.num_kv_heads, launch.block_m // launch.block_r)](
                out, *scratch, arrays.header, arrays.starts, arrays.prefix_lens, block_r=launch.block_r, **constants
            )

    def _constants(self, query: torch.Tensor, geometry: LayerGeometry, launch: Launch) -> dict[str, Any]:
        """What both kernels are compiled for, then what they read of the step and its class."""
        return {
            "num_positions": query.shape[1],
            "is_emulated": query.device.type == "cpu" and query.dtype == torch.bfloat16,
            "window": geometry.window or 0,
            "kv_heads": geometry.num_kv_heads,
            "fold": geometry.num_heads // geometry.num_kv_heads,
            "v_dim": geometry.v_dim,
            "v_pad": launch.v_pad,
            "segments_pad": self._arrays.rows.shape[0],
            "block_q": launch.block_q,
            "block_m": launch.block_m,
            "block_n": launch.block_n,
            "num_splits": launch.num_splits,
            "num_programs": launch.num_programs,
            "min_keys": launch.min_keys,
            **OPTIONS,
        }

    def _split_scratch(
        self, launch: Launch, geometry: LayerGeometry, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Partial sums [lines, v_dim], tops and totals [lines]; lines = items * kv_heads * splits * block_m."""
        lines = launch.num_items * geometry.num_kv_heads * launch.num_splits * launch.block_m
        if launch.num_splits == 1:
            lines = 0
        numbers = lines * geometry.v_dim
        scratch = self._owner.scratch(numbers + 2 * lines, device)
        return scratch[:numbers], scratch[numbers : numbers + lines], scratch[numbers + lines : numbers + 2 * lines]
