"""Products of matrices whose answers change their rank before the next operators: TVM's schedules refuse them fused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper
from relay_worker import relay_worker, through_product

# Selu and Softplus read their input twice: TVM fuses what lies between such readings as one.
NETWORKS = {
    "float[1, 4, 4] x": """a = Flatten(x) b = Gemm(a, v) c = Selu(b) d = Reshape(c, four)
        e = Softplus(d) y = Add(d, e)""",
    "float[1, 1, 16] x": """a = MatMul(x, v) b = Selu(a) c = Unsqueeze(b, zero) d = Softplus(c)
        y = Add(c, d)""",
    "float[1, 3, 16] x": """t = Transpose<perm = [0, 2, 1]>(x) a = MatMul(t, x) b = Selu(a)
        c = Reshape(b, last) d = Softplus(c) y = Add(c, d)""",
    "float[1, 16] x": "a = MatMul(x, v) b = Selu(a) y = Mul(b, wide)",
}


def test_a_change_of_rank_behind_a_product_is_compiled() -> None:
    random = np.random.default_rng(0)
    constants = {
        "v": random.standard_normal((16, 6), dtype=np.float32),
        "wide": random.standard_normal((1, 2, 1, 6), dtype=np.float32),
        "four": np.array([1, 1, 1, 6]),
        "zero": np.array([0]),
        "last": np.array([1, 4, 4, 16]),
    }
    with relay_worker() as pool:
        for given, body in NETWORKS.items():
            proto = onnx.parser.parse_model(
                f"""<ir_version: 8, opset_import: ["": 17]>
                g ({given}) => (float y) {{ {body} }}"""
            )
            proto.graph.output[0].type.tensor_type.ClearField("shape")
            proto.graph.initializer.extend(
                numpy_helper.from_array(value, name)
                for name, value in constants.items()
                if name in body
            )
            proto = onnx.shape_inference.infer_shapes(proto)
            shape = [
                each.dim_value
                for each in proto.graph.input[0].type.tensor_type.shape.dim
            ]
            x = random.standard_normal(shape, dtype=np.float32)
            model = proto.SerializeToString()
            *_, passed = pool.submit(through_product, model, x).result()
            assert passed, body
