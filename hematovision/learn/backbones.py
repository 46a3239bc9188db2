"""The three networks of the study, in one table; their initial weights; the models built on them.

Nothing here imports Keras before a model is built, so that `check_weights` can run first and fast.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hematovision.config import Profile, pretrained_file
from hematovision.errors import WeightsError
from hematovision.learn import runtime
from hematovision.learn.compact import load_compact, read_facts

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Backbone:
    """One network that turns a picture into a feature map.

    Attributes
    ----------
    name : str
        Key of the table.
    title : str
        As written in tables and text.
    application : str
        Its name in ``keras.applications``.
    scaling : str
        What its ImageNet weights expect: ``"caffe"`` (BGR, ImageNet mean removed, no scaling) or
        ``"tf"`` (RGB from -1 to 1).
    imagenet_file : str
        The file that Keras looks for in its cache.
    features : int
        Channels of the last feature map.
    has_batch_norm : bool
    published_accuracy : float
        On the Kaggle set, of a widely copied study that splits it by image (0 to 1).
    reference : str
    story : str
        What a student should know about it, used by the notebook.
    precision : str
        The faster one on a processor: bfloat16 halves the time of plain convolutions and slows down
        depthwise ones.
    """

    name: str
    title: str
    application: str
    scaling: str
    imagenet_file: str
    features: int
    has_batch_norm: bool
    published_accuracy: float
    reference: str
    story: str
    precision: str = "float32"


BACKBONES: dict[str, Backbone] = {
    b.name: b
    for b in (
        Backbone(
            "vgg16",
            "VGG16",
            "VGG16",
            "caffe",
            "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
            512,
            False,
            0.903,
            "Simonyan and Zisserman 2014, arXiv 1409.1556",
            "Thirteen plain 3x3 convolutions, one after the other, and nothing else: no shortcuts and "
            "no batch normalisation. It is the easiest network to understand, the heaviest to run, and "
            "the hardest of the three to train from nothing.",
            "mixed_bfloat16",
        ),
        Backbone(
            "mobilenetv2",
            "MobileNetV2",
            "MobileNetV2",
            "tf",
            "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
            1280,
            True,
            0.926,
            "Sandler et al. 2018, arXiv 1801.04381",
            "Built for telephones: each block widens its input, filters every channel on its own "
            "(a depthwise convolution), and narrows it again, with a shortcut around the block. It has "
            "a sixth of the weights of VGG16 and answers in milliseconds.",
        ),
        Backbone(
            "resnet50",
            "ResNet50",
            "ResNet50",
            "caffe",
            "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
            2048,
            True,
            0.917,
            "He et al. 2015, arXiv 1512.03385",
            "Fifty layers made trainable by shortcuts: every block learns what to add to its input. "
            "Its batch normalisation keeps a memory of the colours it was trained on, which is what "
            "breaks first in another laboratory; we freeze it when the weights come from elsewhere.",
            "mixed_bfloat16",
        ),
    )
}


def get_backbone(name: str) -> Backbone:
    """Return a row of the table.

    Raises
    ------
    WeightsError
        If there is no such backbone.
    """
    if name not in BACKBONES:
        raise WeightsError(f"there is no backbone '{name}'", f"choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name]


def imagenet_file(backbone: str) -> Path:
    """Return where Keras keeps (or will keep) a backbone's ImageNet weights.

    ``$KERAS_HOME/models`` if that is set, else ``~/.keras/models``.
    """
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras").expanduser()
    return home / "models" / get_backbone(backbone).imagenet_file


def check_weights(profile: Profile) -> None:
    """Make sure, before any work, that every initial weight a profile asks for can be had.

    Raises
    ------
    WeightsError
        Naming the file and the ways out.
    """
    values = profile.to_dict()
    if "final_model" not in profile.extra_notebooks:
        values.pop("final_backbone")
    if "learning_curves" not in profile.extra_notebooks:
        values.pop("curve_sources")
    for name in profile.backbones:
        check_source(name, profile.weights[name])
    for backbone, source in sources_of({**values, "weights": None}):
        check_source(backbone, source)


def sources_of(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every backbone with the initial weights that a notebook's parameters, or a profile, ask for.

    Parameters
    ----------
    parameters : mapping
        ``weights`` is that of ``backbone``; ``final_weights`` and ``audit_weights`` are those of
        ``final_backbone``; ``curve_sources`` holds ``backbone:weights``. Any may be missing.
    """
    found = []
    if parameters.get("backbone") and parameters.get("weights"):
        found.append((parameters["backbone"], parameters["weights"]))
    if final := parameters.get("final_backbone"):
        names = ("final_weights", "audit_weights")
        found += [(final, parameters[name]) for name in names if parameters.get(name)]
    return found + [parse_source(text) for text in parameters.get("curve_sources") or ()]


def parse_source(text: str) -> tuple[str, str]:
    """Return backbone and initial weights of ``backbone:weights``.

    Raises
    ------
    WeightsError
        If it is written otherwise, or there is no such backbone.
    """
    backbone, colon, weights = text.partition(":")
    if not colon or not weights or backbone not in BACKBONES:
        raise WeightsError(
            f"'{text}' is no backbone with its initial weights",
            f"write backbone:weights, with one of {', '.join(BACKBONES)}",
        )
    return backbone, weights


def check_source(backbone: str, source: str) -> None:
    """Make sure that a backbone's initial weights can be had.

    A missing ImageNet file is downloaded by Keras itself, in a process of its own, so that neither
    a slow import nor a half-written file reaches the caller.

    Raises
    ------
    WeightsError
        Naming the file and the ways out.
    """
    if source == "none":
        return
    if source == "imagenet":
        if not imagenet_file(backbone).is_file():
            _download_imagenet(backbone)
    elif source == "hematovision":
        read_facts(_released(backbone))
    elif not Path(source).expanduser().is_file():
        raise WeightsError(
            f"initial weights {source} for {backbone} are not there",
            f"name a .weights.h5, .h5 or .npz file, or use --set weights.{backbone}=imagenet, "
            "=hematovision or =none",
        )


def _released(name: str) -> Path:
    file = pretrained_file(name)
    if not file.is_file():
        raise WeightsError(
            f"the released weights {file} are not there",
            f"get the whole project, make them with `hematovision pretrain --backbone {name}`, "
            f"or use --set weights.{name}=none",
        )
    return file


def weights_file(backbone: str, source: str) -> Path | None:
    """Return the file that a source of initial weights stands for; None where it is no file of ours."""
    file = pretrained_file(backbone) if source == "hematovision" else Path(source).expanduser()
    return file if file.is_file() else None


def _download_imagenet(name: str) -> None:
    file, application = imagenet_file(name), get_backbone(name).application
    if sys.stderr.isatty():  # a person waits; a log gets one line, and only if it fails
        print(f"downloading {file.name} (ImageNet weights, by Keras)", end="\r", file=sys.stderr, flush=True)
    code = (
        # a network that swallows packets must not hang the run
        "import socket; socket.setdefaulttimeout(30); import keras; "
        "keras.config.disable_interactive_logging(); "
        f"keras.applications.{application}(include_top=False, weights='imagenet', "
        "input_shape=(None, None, 3))"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    if sys.stderr.isatty():
        print("\x1b[K", end="", file=sys.stderr, flush=True)
    if result.returncode or not file.is_file():
        raise WeightsError(
            f"the ImageNet weights {file.name} are not in {file.parent} and could not be downloaded",
            "connect to a network, point KERAS_HOME at a folder whose models/ holds the file, "
            "or train from nothing with --set weights=none",
        )


def initial_weights_title(source: str) -> str:
    """Return how a source of initial weights is written in every table."""
    known = {"imagenet": "ImageNet", "hematovision": "blood (PBC)", "none": "from scratch"}
    return known.get(source, Path(source).name)


def build_base(backbone: str, weights: str, seed: int = 0) -> keras.Model:
    """Return the network without its top: float images in, feature map out, any size.

    Parameters
    ----------
    backbone : str
    weights : str
        ``"imagenet"``, ``"hematovision"`` (trained on PBC's eight classes, released with the project),
        ``"none"`` or a weight file of this architecture.
    seed : int
        Of the random initialisation, where weights is ``"none"``.

    Raises
    ------
    WeightsError
        If the file is missing or belongs to another architecture.
    """
    import keras

    row = get_backbone(backbone)
    application = getattr(keras.applications, row.application)
    keras.utils.set_random_seed(seed)
    # a size left open: Keras otherwise asks for a size-specific ImageNet file
    shape = (None, None, 3)
    if weights == "imagenet":
        try:
            with warnings.catch_warnings():
                # MobileNetV2 says that an open size gets the weights of 224 pixels, which is what we want
                warnings.filterwarnings("ignore", message="`input_shape` is undefined")
                return application(include_top=False, weights="imagenet", input_shape=shape, name=row.name)
        except Exception as error:  # Keras raises bare Exceptions for failed downloads and bad files
            raise WeightsError(
                f"the ImageNet weights {imagenet_file(backbone)} could not be loaded ({_first_line(error)})",
                "remove the file and download it again, or use --set weights=none",
            ) from error
    base = application(include_top=False, weights=None, input_shape=shape, name=row.name)
    if weights == "none":
        _start_from_nothing(base, seed)
        return base
    file = _released(backbone) if weights == "hematovision" else Path(weights).expanduser()
    if file.suffix == ".npz":
        load_compact(base, file)
        return base
    try:
        runtime.load_weights(base, file)
    except Exception as error:
        raise WeightsError(
            f"{weights} does not fit {row.title} ({_first_line(error)})",
            "name a weight file of this backbone without its top",
        ) from error
    return base


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _start_from_nothing(base: keras.Model, seed: int) -> None:
    """Make a randomly initialised network trainable within the few hundred steps that we can afford.

    Plain networks get kernels after He et al. 2015, the first one divided by the spread of its
    inputs (pixels with the mean removed have a standard deviation of about 64). Batch normalisation
    remembers about ten steps: with Keras's 0.99 and more its running means lag hundreds of steps
    behind, and validation looks like chance long after training has learned.
    """
    import keras

    norms = [layer for layer in base.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.9
    if norms:
        return
    convolutions = [layer for layer in base.layers if isinstance(layer, keras.layers.Conv2D)]
    for i, layer in enumerate(convolutions):
        kernel = keras.initializers.HeNormal(seed + i)(layer.kernel.shape)
        layer.kernel.assign(kernel / 64.0 if i == 0 else kernel)


def build_preprocessing(backbone: str, images: Any) -> Any:
    """Return the backbone's own input scaling as a part of the graph, so that the saved model has it.

    Parameters
    ----------
    images : Keras tensor
        RGB, 0 to 255, shape (B, H, W, 3).
    """
    import keras

    if get_backbone(backbone).scaling == "tf":
        return keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="preprocessing")(images)
    bgr = keras.ops.flip(images, axis=-1)
    # ImageNet's mean in BGR order, as keras.applications.imagenet_utils removes it
    return keras.layers.Rescaling(1.0, offset=[-103.939, -116.779, -123.68], name="preprocessing")(bgr)


def build_feature_extractor(backbone: str, base: keras.Model, input_size: int) -> keras.Model:
    """Return the frozen network with global average pooling: images in, features out.

    Maps float32 (B, input_size, input_size, 3), RGB 0 to 255, to float32 (B, features).
    """
    import keras

    images = keras.Input((input_size, input_size, 3), name="image")
    feature_map = base(build_preprocessing(backbone, images), training=False)
    features = keras.layers.GlobalAveragePooling2D(name="features", dtype="float32")(feature_map)
    return keras.Model(images, features, name=f"{backbone}_features")


HEADS = ("average", "attention")
# 4 heads of 64 on 256 channels: 0.26 million weights, and 0.13 to 0.52 million for the projection
_ATTENTION_CHANNELS, _ATTENTION_HEADS, _ATTENTION_KEY = 256, 4, 64


def build_head(
    features: int, n_classes: int, dropout: float, seed: int, kind: str = "average"
) -> keras.Model:
    """Return the head: what turns the network's last feature map into probabilities.

    Parameters
    ----------
    features : int
        Channels of the feature map.
    n_classes : int
    dropout : float
        Before the dense layer, 0 to 1.
    seed : int
    kind : str
        ``"average"``: dropout and one dense layer with softmax on globally averaged features; maps
        float32 (B, features) to probabilities float32 (B, n_classes). ``"attention"``: the places of
        the map look at each other before they are averaged; maps (B, H, W, features), any size, to the
        same.

    Raises
    ------
    ValueError
        If there is no such kind.
    """
    import keras

    if kind not in HEADS:
        raise ValueError(f"there is no head '{kind}'; choose one of {', '.join(HEADS)}")
    if kind == "average":
        entry = pooled = keras.Input((features,), name="pooled")
    else:
        entry = keras.Input((None, None, features), name="feature_map")
        pooled = _attend(entry, seed)
    x = keras.layers.Dropout(dropout, seed=seed, dtype="float32")(pooled)
    initial = keras.initializers.GlorotUniform(seed)
    # probabilities stay in float32 whatever the precision of the backbone
    x = keras.layers.Dense(n_classes, "softmax", kernel_initializer=initial, dtype="float32")(x)
    return keras.Model(entry, x, name="head")


def _attend(feature_map: Any, seed: int) -> Any:
    """Pool a feature map by self-attention: a block of a transformer's encoder, without its MLP.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2. No position is encoded: a cell means the same
    wherever its parts lie, and the map's size stays open.
    """
    import keras

    # attention's own initialisers draw from Keras's global generator; one seed handed to all three
    # projections would make queries and keys the same
    keras.utils.set_random_seed(seed)
    layers, float32 = keras.layers, {"dtype": "float32"}
    x = layers.Conv2D(_ATTENTION_CHANNELS, 1, name="projection", **float32)(feature_map)
    x = layers.Reshape((-1, _ATTENTION_CHANNELS), name="places", **float32)(x)
    seen = layers.MultiHeadAttention(_ATTENTION_HEADS, _ATTENTION_KEY, name="attention", **float32)(x, x)
    x = layers.LayerNormalization(name="norm", **float32)(layers.Add(**float32)([x, seen]))
    return layers.GlobalAveragePooling1D(name="features", **float32)(x)


def build_classifier(
    backbone: str, base: keras.Model, head: keras.Model, input_size: int, *, frozen_batch_norm: bool
) -> keras.Model:
    """Join preprocessing, network and head into the model that is trained and saved.

    A head for pooled features gets the global average of the feature map, any other the map itself.

    Maps float32 images (B, input_size, input_size, 3), RGB 0 to 255, to probabilities (B, C).
    With ``frozen_batch_norm`` the network always runs in inference mode: its batch statistics stay
    those of its initial weights.
    """
    import keras

    images = keras.Input((input_size, input_size, 3), name="image")
    x = build_preprocessing(backbone, images)
    feature_map = base(x, training=False) if frozen_batch_norm else base(x)
    if len(head.input_shape) == 4:
        return keras.Model(images, head(feature_map), name=f"hematovision_{backbone}")
    pooled = keras.layers.GlobalAveragePooling2D(name="features", dtype="float32")(feature_map)
    return keras.Model(images, head(pooled), name=f"hematovision_{backbone}")


def rebuild_in_float32(
    classifier: keras.Model, backbone: str, head: keras.Model, input_size: int, seed: int
) -> keras.Model:
    """Return the same classifier built in float32, whatever precision it was trained in.

    Parameters
    ----------
    classifier : keras.Model
        From `build_classifier`.
    backbone : str
    head : keras.Model
        A new one, of the classifier's kind; a head computes in float32 anyway.
    input_size : int
        May be another than the classifier's.
    seed : int
    """
    import keras

    keras.config.set_dtype_policy("float32")
    base = build_base(backbone, "none", seed)
    plain = build_classifier(backbone, base, head, input_size, frozen_batch_norm=True)
    plain.set_weights(classifier.get_weights())
    return plain


def set_trainable(base: keras.Model, last_layers: int, *, frozen_batch_norm: bool) -> int:
    """Make the last layers of a network trainable; return how many weights that frees.

    Parameters
    ----------
    base : keras.Model
    last_layers : int
        Counted over the network's layers; 0 for all of them.
    frozen_batch_norm : bool
        Keep batch normalisation as it is, also inside the freed layers.

    Notes
    -----
    Compile the model again afterwards: Keras reads ``trainable`` when it compiles.
    """
    import keras

    base.trainable = True
    first = 0 if last_layers == 0 else max(0, len(base.layers) - last_layers)
    for i, layer in enumerate(base.layers):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = i >= first and not (is_norm and frozen_batch_norm)
    return int(sum(int(_size(w.shape)) for w in base.trainable_weights))


def _size(shape: tuple[int, ...]) -> int:
    n = 1
    for edge in shape:
        n *= edge
    return n
