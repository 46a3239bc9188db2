"""Running a LiteRT model: pictures in, probabilities out, and where the model looked if it tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from hematovision.quiet import silence

_THREADS = 2


@dataclass(frozen=True)
class Answer:
    """What a model said of one picture.

    Attributes
    ----------
    probabilities : float32 array of shape (C,)
    activation_map : float32 array of shape (h, w, C) or None
        How much each place of the picture spoke for each class, coarser than the picture; None where
        the model does not tell.
    """

    probabilities: NDArray[np.float32]
    activation_map: NDArray[np.float32] | None = None


def start_interpreter(content: bytes) -> Interpreter:
    """Make a LiteRT model ready to run, quietly.

    Raises
    ------
    ValueError, RuntimeError
        If it is no LiteRT model, or needs operations that LiteRT alone does not have.
    """
    with silence():
        interpreter = Interpreter(model_content=content, num_threads=_THREADS)
        interpreter.allocate_tensors()
    return interpreter


def run_model(interpreter: Interpreter, image: NDArray[Any]) -> NDArray[np.float32]:
    """Run a model on one picture: (size, size, 3), RGB 0 to 255, to probabilities float32 (C,)."""
    return answer(interpreter, image).probabilities


def answer(interpreter: Interpreter, image: NDArray[Any]) -> Answer:
    """Run a model on one picture and return all that it says.

    A converter may put outputs in any order: probabilities are the one with an axis for the classes
    alone, an activation map is the one with two more for the place.

    Parameters
    ----------
    interpreter : Interpreter
    image : array of shape (size, size, 3)
        RGB, 0 to 255.
    """
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None].astype(np.float32))
    interpreter.invoke()
    said: dict[int, NDArray[np.float32]] = {}
    for output in interpreter.get_output_details():
        values = np.array(interpreter.get_tensor(output["index"])[0], np.float32)
        said[values.ndim] = values
    return Answer(said[1], said.get(3))
