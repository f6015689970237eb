"""What to do with a file that is neither ONNX nor TFLite: one line for each format that people have."""

from __future__ import annotations

from pathlib import Path

_TF2ONNX = "python -m tf2onnx.convert {} --output model.onnx (package tf2onnx)"
_PYTORCH = (
    "belongs to PyTorch; in Python, torch.onnx.export(model.eval(), torch.zeros(1, 3, 224, 224), "
    '"model.onnx", dynamo=False) makes an ONNX file, with the input\'s size of your network'
)
_KERAS = (
    'is a Keras model; in Python, model.export("model.onnx", format="onnx") of Keras 3 makes an ONNX file, '
    f"or {_TF2ONNX.format('--keras model.h5')}"
)
_TENSORFLOW = "is a TensorFlow graph; make an ONNX file of it: " + _TF2ONNX.format(
    "--graphdef model.pb --inputs input:0 --outputs output:0"
)
_SAVED_MODEL = "is a folder of TensorFlow; make an ONNX file of it: " + _TF2ONNX.format(
    "--saved-model FOLDER"
)
_TFLITE = "is no TFLite model: its bytes 4 to 7 are not TFL3; convert or copy it again"
_ORIGINAL = "is for {}; export an ONNX file from the network that it was made of"

_BY_SUFFIX = {
    **dict.fromkeys((".h5", ".hdf5", ".keras"), _KERAS),
    **dict.fromkeys((".pt", ".pth", ".pt2", ".ckpt", ".safetensors"), _PYTORCH),
    ".pb": _TENSORFLOW,
    ".tflite": _TFLITE,
    **dict.fromkeys((".mlmodel", ".mlpackage"), _ORIGINAL.format("Core ML")),
    ".xml": _ORIGINAL.format("OpenVINO"),
    **dict.fromkeys((".param", ".ncnn"), _ORIGINAL.format("ncnn")),
    ".mnn": _ORIGINAL.format("MNN"),
    **dict.fromkeys((".engine", ".trt", ".plan"), _ORIGINAL.format("TensorRT")),
    ".ort": _ORIGINAL.format("ONNX Runtime's own format"),
}


def advice(path: Path) -> str | None:
    """What a file or folder is, by its name, and how to make ONNX of it; None for other names and for nothing at all."""
    if path.is_dir() and path.suffix.lower() not in _BY_SUFFIX:
        return _SAVED_MODEL if (path / "saved_model.pb").exists() else None
    return _BY_SUFFIX.get(path.suffix.lower()) if path.exists() else None
