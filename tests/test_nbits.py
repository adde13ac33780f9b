"""How weights of whole numbers lie, and how they are rounded, against loops over single numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmonnx.errors import InputError
from nmonnx.nbits import BLOCK_SIZE, Quantised, in_form, pack, packed_shape, quantise, unpack

RNG = np.random.default_rng(3)


@given(st.integers(1, 5), st.integers(1, 70))
def test_packed_codes_come_back(channels: int, columns: int) -> None:
    codes = RNG.integers(0, 16, (channels, columns)).astype(np.uint8)
    data = pack(codes)
    assert data.shape == packed_shape(channels, columns, 4) and data.dtype == np.uint8
    np.testing.assert_array_equal(unpack(data, columns), codes)


def test_a_byte_holds_columns_that_are_sixteen_apart() -> None:
    data = pack((np.arange(40) % 16).astype(np.uint8)[None])
    for column in range(40):
        chunk, place = divmod(column, 32)
        byte = int(data[0, 16 * chunk + place % 16])
        assert (byte >> 4 if place >= 16 else byte & 15) == column % 16


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 80), st.integers(1, 40), st.floats(0.1, 1e3))
def test_values_are_within_a_step_and_no_worse_than_plain_rounding(
    bits: int, channels: int, columns: int, size: float
) -> None:
    weight = (RNG.standard_normal((channels, columns)) * size).astype(np.float32)
    made = quantise(weight, bits)
    lowest = -(2 ** (bits - 1))
    error, plain = made.values() - weight, np.empty_like(weight)
    for column in range(columns):
        for start in range(0, channels, BLOCK_SIZE):
            cut = slice(start, min(start + BLOCK_SIZE, channels))
            values = weight[cut, column].astype(np.float64)
            scale = float(np.float16(values[np.abs(values).argmax()] / lowest))
            plain[cut, column] = np.clip(np.rint(values / scale), lowest, -1 - lowest) * scale
            stored = abs(float(made.scales[start // BLOCK_SIZE, column]))
            assert np.abs(error[cut, column]).max() <= 1.8 * stored
    assert np.linalg.norm(error) <= np.linalg.norm(plain - weight) * (1 + 1e-5)


def test_a_block_of_zeros_is_zeros() -> None:
    weight = np.zeros((64, 3), np.float32)
    weight[32:] = 1
    np.testing.assert_array_equal(quantise(weight, 4).values(), weight)


@pytest.mark.parametrize("size", [1e-7, 1e8])
def test_scales_beyond_float16_are_float32(size: float) -> None:
    weight = (RNG.standard_normal((32, 4)) * size).astype(np.float32)
    made = quantise(weight, 8)
    assert made.scales.dtype == np.float32
    np.testing.assert_allclose(made.values(), weight, atol=size / 20)


@pytest.mark.parametrize(("form", "value"), [("int4", np.nan), ("int8", np.inf), ("fp16", 1e6)])
def test_what_has_no_place_in_a_form_is_refused(form: str, value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        in_form(np.full((16, 2), value, np.float32), form)


def test_zero_points_and_short_blocks_are_read_as_they_are_defined() -> None:
    codes = RNG.integers(-128, 128, (50, 3)).astype(np.int8)
    scales, zeros = RNG.random((4, 3)).astype(np.float32), RNG.integers(-128, 128, (4, 3)).astype(np.int8)
    values = Quantised(8, 16, codes, scales, zeros).values()
    for k in range(50):
        for n in range(3):
            block = k // 16
            assert values[k, n] == np.float32(int(codes[k, n]) - int(zeros[block, n])) * scales[block, n]
