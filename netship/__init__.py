"""netship: trained vision networks from ONNX to the device that runs them, on Apache TVM.

In a checkout this folder has links to the project's folders; an installed package has the folders themselves.
"""
