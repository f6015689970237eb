"""``--precision auto``: each layer in int8, float16 or float32."""
