"""Conversion to LiteRT: the same answers in float32, nearly the same in int8, and in silence."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from hematovision.errors import DataError
from hematovision.release.litert import answer, start_interpreter

SIZE = 32
keras = pytest.importorskip("keras")

pytestmark = pytest.mark.slow


def _crops(count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    grounds = random.integers(0, 200, (count, 1, 1, 3))
    return (grounds + random.integers(0, 56, (count, SIZE, SIZE, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> Any:
    from hematovision.learn import runtime

    runtime.start(1)
    keras.config.set_dtype_policy("float32")
    images = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0)(images)
    x = keras.layers.Conv2D(16, 3, strides=2, activation="relu")(x)
    x = keras.layers.DepthwiseConv2D(3, activation="relu")(x)
    # larger than usual, so that the answers differ from crop to crop
    wide = keras.initializers.RandomNormal(0, 2.0, seed=1)
    maps = keras.layers.Conv2D(4, 1, kernel_initializer=wide)(x)
    said = keras.layers.Dense(4, "softmax", kernel_initializer=wide)(
        keras.layers.GlobalAveragePooling2D()(maps)
    )
    return keras.Model(images, [said, maps])


def _operations(content: bytes) -> Counter[tuple[str, str]]:
    """Count operations by name and by the type of their first input."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    types = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    graph = model.subgraphs[0]
    codes = [names[max(c.builtinCode, c.deprecatedBuiltinCode)] for c in model.operatorCodes]
    return Counter((codes[o.opcodeIndex], types[graph.tensors[o.inputs[0]].type]) for o in graph.operators)


def test_float32_answers_as_keras_does_in_silence(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from hematovision.learn.conversion import convert_float32

    content = convert_float32(model)
    assert capfd.readouterr() == ("", "")
    crops = _crops(8, 0)
    said, maps = model.predict_on_batch(crops.astype(np.float32))
    assert np.ptp(said, axis=0).max() > 0.05
    interpreter = start_interpreter(content)
    for row, crop in enumerate(crops):
        lite = answer(interpreter, crop)
        # both compute in float32, in another order
        np.testing.assert_allclose(lite.probabilities, said[row], atol=1e-5)
        np.testing.assert_allclose(lite.activation_map, maps[row], atol=1e-4)
        assert lite.activation_map is not None
    assert convert_float32(model) == content


def test_int8_holds_all_but_softmax_in_eight_bits(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from hematovision.learn.conversion import convert_float32, convert_int8

    content = convert_int8(model, iter(_crops(40, 1)))
    assert capfd.readouterr() == ("", "")
    in_float = {name for name, kind in _operations(content) if kind == "FLOAT32"}
    assert in_float == {"QUANTIZE", "SOFTMAX"}  # the border, and what is left out on purpose
    assert {n for n, k in _operations(content) if k == "INT8"} >= {"CONV_2D", "FULLY_CONNECTED"}
    assert "SOFTMAX" in {name for name, _ in _operations(convert_float32(model))}

    interpreter = start_interpreter(content)
    details = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    assert all(detail["dtype"] is np.float32 for detail in details)
    crops = _crops(8, 0)
    said, _ = model.predict_on_batch(crops.astype(np.float32))
    lite = np.stack([answer(interpreter, crop).probabilities for crop in crops])
    np.testing.assert_allclose(lite.sum(axis=1), 1, atol=1e-5)  # a softmax in int8 misses by 1/256 a class
    np.testing.assert_allclose(lite, said, atol=0.1)  # 256 steps over the range of each activation


def test_weights_have_a_scale_for_every_channel(model: Any) -> None:
    from hematovision.learn.conversion import convert_int8

    packed = schema.ModelT.InitFromPackedBuf(convert_int8(model, _crops(20, 1)), 0)
    scales = [
        len(t.quantization.scale)
        for t in packed.subgraphs[0].tensors
        if t.quantization is not None and t.quantization.scale is not None and len(t.shape) == 4
    ]
    assert 16 in scales


def test_what_int8_cannot_be_calibrated_on_is_refused(model: Any) -> None:
    from hematovision.learn.conversion import convert_int8

    with pytest.raises(DataError, match="no crop to calibrate"):
        convert_int8(model, [])
    with pytest.raises(DataError, match=r"crops of shape \(32, 32, 3\)"):
        convert_int8(model, np.zeros((2, 16, 16, 3), np.uint8))
