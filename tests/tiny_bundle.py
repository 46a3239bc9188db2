"""A bundle that is made in milliseconds, without TensorFlow: its model goes by the mean colour alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from hematovision.files import write_json

CLASSES = ("eosinophil", "lymphocyte", "monocyte", "neutrophil")
SIZE = 32

# logits = mean colour (0 to 255) times these: red, green, blue, and none of the three
WEIGHTS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], np.float32) / 25
BIAS = np.array([0, 0, 0, 4.0], np.float32)


def expected(rgb: Any) -> np.ndarray:
    """Return the probabilities that the model must give for a crop."""
    logits = WEIGHTS @ np.asarray(rgb, np.float64).reshape(-1, 3).mean(axis=0) + BIAS
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def build_model(size: int = SIZE, classes: int = len(CLASSES), *, map_first: bool | None = None) -> bytes:
    """Return a LiteRT model: the mean over all pixels, one dense layer, softmax.

    With ``map_first`` given it has an activation map too, 4 x 4 pixels of 0 for every class, which comes
    before the probabilities or after them.
    """
    axes = np.array([1, 2], np.int32)
    weights, bias = WEIGHTS[:classes], BIAS[:classes]
    constants: list[Any] = [axes, weights, bias]
    model = schema.ModelT()
    model.version = 3
    model.buffers = [schema.BufferT() for _ in range(1 + len(constants))]
    for buffer, values in zip(model.buffers[1:], constants, strict=True):
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    shapes = [[1, size, size, 3], [2], [1, 3], weights.shape, bias.shape, [1, classes], [1, classes]]
    graph = schema.SubGraphT()
    graph.tensors = [_tensor(shape, place in (1,)) for place, shape in enumerate(shapes)]
    for place, buffer in ((1, 1), (3, 2), (4, 3)):
        graph.tensors[place].buffer = buffer
    kinds = schema.BuiltinOperator
    options = schema.BuiltinOptions
    mean, dense, softmax = schema.ReducerOptionsT(), schema.FullyConnectedOptionsT(), schema.SoftmaxOptionsT()
    softmax.beta = 1.0
    steps = [
        (kinds.MEAN, options.ReducerOptions, mean, [0, 1], 2),
        (kinds.FULLY_CONNECTED, options.FullyConnectedOptions, dense, [2, 3, 4], 5),
        (kinds.SOFTMAX, options.SoftmaxOptions, softmax, [5], 6),
    ]
    graph.operators, model.operatorCodes = [], []
    for number, (kind, option_kind, option, inputs, output) in enumerate(steps):
        code, step = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = code.deprecatedBuiltinCode = kind
        code.version = 1
        step.opcodeIndex, step.builtinOptionsType, step.builtinOptions = number, option_kind, option
        step.inputs, step.outputs = inputs, [output]
        model.operatorCodes.append(code)
        graph.operators.append(step)
    graph.inputs, graph.outputs = [0], [6]
    if map_first is not None:
        values = np.zeros((1, 4, 4, classes), np.float32)
        model.buffers.append(schema.BufferT())
        model.buffers[-1].data = np.frombuffer(values.tobytes(), np.uint8)
        graph.tensors.append(_tensor(values.shape, False))
        graph.tensors[-1].buffer = len(model.buffers) - 1
        graph.outputs = [7, 6] if map_first else [6, 7]
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _tensor(shape: Any, whole: bool) -> Any:
    tensor = schema.TensorT()
    tensor.shape = list(shape)
    tensor.type = schema.TensorType.INT32 if whole else schema.TensorType.FLOAT32
    return tensor


def card(models: dict[str, bytes], **changes: Any) -> dict[str, Any]:
    """Return the values of a ``model.json``, some of them changed."""
    values: dict[str, Any] = {
        "format": 2,
        "purpose": "for research and teaching, not for clinical use",
        "classes": list(CLASSES),
        "input": {"size": SIZE, "cell_size": SIZE, "crop_margin": 0.15},
        "outputs": [{"name": "probabilities", "shape": [len(CLASSES)]}],
        "calibration": {"method": "temperature", "temperature": 1.0, "fitted_on": ""},
        "thresholds": {"confidence": 0.6, "sharpness": 0.0025},
        "backbone": "mobilenetv2",
        "weights": "none",
        "files": {name: stamp(content) for name, content in models.items()},
        "provenance": {"profile": "tiny", "dataset": "synthetic", "version": "0"},
        "metrics": {},
    }
    if "temperature" in changes and changes.get("format") != 1:
        values["calibration"]["temperature"] = changes.pop("temperature")
    return values | changes


def stamp(content: bytes) -> dict[str, Any]:
    """Return what a ``model.json`` says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_bundle(
    folder: Path, model: bytes | None = None, *, others: dict[str, bytes] | None = None, **changes: Any
) -> Path:
    """Write a whole bundle, with other files beside its model if given; return its folder."""
    models = {"model.tflite": build_model() if model is None else model, **(others or {})}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in models.items():
        (folder / name).write_bytes(content)
    write_json(folder / "model.json", card(models, **changes))
    return folder


def write_old_bundle(folder: Path) -> Path:
    """Write a bundle of format 1, as the first version did; return its folder."""
    content = build_model()
    values = card({"model.tflite": content}, format=1, temperature=1.5)
    for name in ("outputs", "calibration", "files"):
        del values[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.tflite").write_bytes(content)
    write_json(folder / "model.json", values | {"model": {"file": "model.tflite", **stamp(content)}})
    return folder
