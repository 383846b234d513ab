"""The published comparison as it was published: Keras, TF-MOT and TFLite, in an interpreter that has them.

``python keras_mnist.py train DATA.npz FOLDER SEED BASELINE_EPOCHS EPOCHS`` trains and converts everything
into ``FOLDER`` and writes ``made.json``. ``python keras_mnist.py serve MODEL DATA.npz THREADS REPEAT COUNT
CHUNK`` answers each line with a line, having run ``COUNT`` images ``REPEAT`` times, ``CHUNK`` a call: to be
timed. Every call of TF-MOT is the one that its guides show, on pruning, on quantization-aware training and on
keeping zeros through it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tf_keras as keras

BATCH = 32


def define() -> keras.Model:
    """Conv 12 of 3×3, max pool, dense 10."""
    return keras.Sequential([
        keras.layers.InputLayer(input_shape=(28, 28)),
        keras.layers.Reshape(target_shape=(28, 28, 1)),
        keras.layers.Conv2D(filters=12, kernel_size=(3, 3), activation="relu"),
        keras.layers.MaxPooling2D(pool_size=(2, 2)),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ])  # fmt: skip


def train(data: str, folder: str, seed: str, baseline_epochs: str, epochs: str) -> None:
    """Baseline, pruned, QAT, and pruned then QAT; each converted; accuracy and bytes of each."""
    import tensorflow_model_optimization as tfmot

    keras.utils.set_random_seed(int(seed))
    arrays, place = dict(np.load(data)), Path(folder)
    images, labels = arrays["train_x"], arrays["train_y"]
    steps = int(np.ceil(len(images) / BATCH)) * int(epochs)

    def fitted(model: keras.Model, count: str, callbacks: list | None = None) -> keras.Model:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
        model.fit(images, labels, batch_size=BATCH, epochs=int(count), verbose=0, callbacks=callbacks)
        return model

    def copied(model: keras.Model) -> keras.Model:
        twin = define()
        twin.set_weights(model.get_weights())
        return twin

    rows = {}

    def note(name: str, path: Path) -> None:
        answers = outputs(path, arrays["test_x"]).argmax(-1)
        accuracy = float((answers == arrays["test_y"]).mean())
        rows[name] = {
            "accuracy": accuracy,
            "bytes": path.stat().st_size,
            "zipped": zipped(path),
            "file": path.name,
        }

    def saved(model: keras.Model, name: str) -> Path:
        path = place / f"{name}.h5"
        keras.models.save_model(model, path, include_optimizer=False)
        return path

    def converted(model: keras.Model, name: str, quantized: bool) -> Path:
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if quantized:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        path = place / f"{name}.tflite"
        path.write_bytes(converter.convert())
        return path

    baseline = fitted(define(), baseline_epochs)
    note("baseline", saved(baseline, "baseline"))
    note("baseline, deployed", converted(baseline, "baseline", False))

    schedule = tfmot.sparsity.keras.PolynomialDecay(
        initial_sparsity=0.50, final_sparsity=0.80, begin_step=0, end_step=steps
    )
    pruning = tfmot.sparsity.keras.prune_low_magnitude(copied(baseline), pruning_schedule=schedule)
    fitted(pruning, epochs, [tfmot.sparsity.keras.UpdatePruningStep()])
    pruned = tfmot.sparsity.keras.strip_pruning(pruning)
    note("pruned", saved(pruned, "pruned"))
    note("pruned, deployed", converted(pruned, "pruned", False))

    quantized = fitted(tfmot.quantization.keras.quantize_model(copied(baseline)), epochs)
    note("QAT, deployed", converted(quantized, "qat", True))

    annotated = tfmot.quantization.keras.quantize_annotate_model(pruned)
    scheme = tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
    both = fitted(tfmot.quantization.keras.quantize_apply(annotated, scheme), epochs)
    note("pruned + QAT, deployed", converted(both, "pruned-qat", True))
    versions = {
        "tensorflow": tf.__version__,
        "tf_keras": keras.__version__,
        "tensorflow-model-optimization": tfmot.__version__,
    }
    (place / "made.json").write_text(json.dumps({"rows": rows, "versions": versions}, indent=1) + "\n")


def zipped(path: Path) -> int:
    """Bytes of a file in a zip archive, which is what TF-MOT's guides call its gzipped size."""
    with tempfile.TemporaryDirectory() as place:
        target = Path(place, "model.zip")
        with zipfile.ZipFile(target, "w", compression=zipfile.ZIP_DEFLATED) as archive:
            archive.write(path)
        return target.stat().st_size


def opened(path: Path, count: int, threads: int):
    """A function from ``count`` images to logits."""
    if path.suffix == ".h5":
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        model = keras.models.load_model(path, compile=False)
        return lambda images: model.predict(images, batch_size=count, verbose=0)
    interpreter = tf.lite.Interpreter(str(path), num_threads=threads)
    entry = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(entry, [count, 28, 28])
    interpreter.allocate_tensors()
    result = interpreter.get_output_details()[0]["index"]

    def call(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(entry, images)
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return call


def outputs(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits of all images."""
    if path.suffix == ".h5":
        return keras.models.load_model(path, compile=False).predict(images, verbose=0)
    return np.array(opened(path, len(images), 1)(images))


def serve(model: str, data: str, threads: str, repeat: str, count: str, chunk: str) -> None:
    """A line in, ``repeat`` runs, a line out."""
    call = opened(Path(model), int(chunk), int(threads))
    images = np.load(data)["test_x"][: int(count)]
    # Keras's predict divides them itself.
    parts = [images] if model.endswith(".h5") else np.split(images, int(count) // int(chunk))
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(int(repeat)):
            for part in parts:
                call(part)
        print("done", flush=True)


if __name__ == "__main__":
    {"train": train, "serve": serve}[sys.argv[1]](*sys.argv[2:])
