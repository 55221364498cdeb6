"""A trained run as files that other programs read: an ONNX graph, or a folder that timm opens."""
