"""Preprocessing by name: how known tools turn a photograph into an input, each with its source."""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal[
    "torchvision",
    "keras-mobilenet",
    "keras-resnet",
    "tflite",
    "yolo",
    "yunet",
    "ultraface",
    "none",
]


PIXELS: dict[str, Any] = {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}
_SIGNED: dict[str, Any] = {"scale": 1 / 127.5, "mean": (1.0,), "std": (1.0,)}
PRESETS: dict[str, dict[str, Any]] = {
    # torchvision 0.20, transforms/_presets.py, ImageClassification: resize_size 256 for crop_size 224, bilinear,
    # and its mean and std.
    "torchvision": {
        "crop_fraction": 0.875,
        "scale": 1 / 255,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    },
    # Keras 3, applications/imagenet_utils.py, preprocess_input, mode "tf": x /= 127.5, x -= 1. Its examples read with
    # utils.load_img(path, target_size=…), which stretches, and whose interpolation is "nearest".
    "keras-mobilenet": {"fit": "stretch", "interpolation": "nearest", **_SIGNED},
    # The same, mode "caffe": RGB to BGR, mean [103.939, 116.779, 123.68], no std.
    "keras-resnet": {
        "fit": "stretch",
        "interpolation": "nearest",
        "channel_order": "BGR",
        "scale": 1.0,
        "mean": (103.939, 116.779, 123.68),
        "std": (1.0, 1.0, 1.0),
    },
    # TensorFlow Lite, examples/label_image: the whole image resized (bilinear) to the input, mean and std 127.5.
    "tflite": {"fit": "stretch", **_SIGNED},
    # Ultralytics 8, data/augment.py, LetterBox: centred, padding 114, cv2.INTER_LINEAR; pixels / 255, RGB.
    "yolo": {"fit": "letterbox", "pad": 114, **PIXELS, "scale": 1 / 255},
    # libfacedetection.train, configs/yunet_n.py: mean 0, std 1, to_rgb False.
    "yunet": {"fit": "letterbox", "channel_order": "BGR", **PIXELS},
    # Ultra-Light-Fast-Generic-Face-Detector-1MB, run_video_face_detect_onnx.py: resize, RGB, (image - 127) / 128.
    "ultraface": {"fit": "stretch", "scale": 1.0, "mean": (127.0,), "std": (128.0,)},
    "none": {"fit": "stretch", **PIXELS},
}
