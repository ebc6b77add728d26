"""Attention on a CPU by compiled code of ours: no gathers, no masks, no padding, whatever rows a step holds.

Trees and chunks alike are attended over the pages where they lie (attention.cpp says how). A step costs one small
record, a layer one call.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from verifier.attention import LayerKV
from verifier.cpu.build import InputsStruct, LayerStruct, StepStruct, load_library
from verifier.cpu.threads import team_size
from verifier.model import KV_ATTRIBUTE, AttentionInputs
from verifier.step import PackedStep

_NO_WINDOW = 2**31 - 1
_FUNCTIONS = {
    torch.float32: "attend_float32",
    torch.bfloat16: "attend_bfloat16",
    torch.float16: "attend_float16",
}


@dataclass(frozen=True, slots=True)
class _Seat:
    """What is the same in all steps of one layer."""

    kv: LayerKV
    layer: LayerStruct
    address: int
    function: ctypes._NamedFuncPointer


class NativeAttention:
    """Owns the records of the layers, by their K/V memory. Raises: NoLibrary if it cannot be compiled here."""

    def __init__(self) -> None:
        self._library = load_library()
        self._seats: dict[int, _Seat] = {}

    def plan(self, step: PackedStep) -> PlannedNative:
        """Tell the compiled code where the step's arrays lie."""
        return PlannedNative(self, step)

    def seat(self, kv: LayerKV) -> _Seat:
        """The records of a layer."""
        found = self._seats.get(id(kv))
        if found is None or found.kv is not kv:
            geometry = kv.geometry
            layer = LayerStruct(
                kv.k.data_ptr(),
                kv.v.data_ptr(),
                geometry.num_heads,
                geometry.num_kv_heads,
                geometry.k_dim,
                geometry.v_dim,
                _NO_WINDOW if geometry.window is None else geometry.window,
                geometry.scaling,
                geometry.softcap or 0.0,
            )
            function = getattr(self._library, _FUNCTIONS[kv.k.dtype])
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
            function.restype = None
            found = self._seats[id(kv)] = _Seat(kv, layer, ctypes.addressof(layer), function)
        return found


class PlannedNative:
    """Attention of one step. Holds the arrays that the compiled code reads."""

    def __init__(self, owner: NativeAttention, step: PackedStep) -> None:
        self._owner = owner
        self._step, self.num_positions = step, step.num_positions
        self._record = StepStruct(
            step.starts.ctypes.data,
            step.rows.ctypes.data,
            step.prefix_lens.ctypes.data,
            step.depths.ctypes.data,
            step.ancestors.ctypes.data,
            step.write_slots.data_ptr(),
            step.page_table.ctypes.data,
            step.rows.shape[0],
            step.num_trees,
            step.page_size,
            step.page_table.shape[1],
            team_size(),
        )
        self.address = ctypes.addressof(self._record)
        """Of the record that the compiled code reads."""

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        kv: LayerKV = getattr(inputs.module, KV_ATTRIBUTE)
        seat = self._owner.seat(kv)
        query, key, value = _dense(inputs.query), _dense(inputs.key), _dense(inputs.value)
        _check(seat, query, key, value)
        sinks = None if inputs.sinks is None else inputs.sinks.float().contiguous()
        out = query.new_empty((1, self._step.num_positions, seat.layer.num_heads, seat.layer.v_dim))
        record = InputsStruct(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            query.stride(1),
            query.stride(2),
            key.stride(1),
            key.stride(2),
            value.stride(1),
            value.stride(2),
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
        )
        seat.function(self.address, seat.address, ctypes.addressof(record))
        return out


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _check(seat: _Seat, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Compiled code reads what it is given: it must be what the layer was when the model was probed."""
    layer, dtype = seat.layer, seat.kv.k.dtype
    found = (query.dtype, key.dtype, value.dtype, query.shape[1], query.shape[3], key.shape[1], value.shape[3])
    heads = (layer.num_heads, layer.k_dim, layer.num_kv_heads, layer.v_dim)
    assert found == (dtype, dtype, dtype, *heads), f"attention of {dtype}, {heads} was called with {found}"
