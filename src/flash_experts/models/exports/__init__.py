"""Models for other runtimes: ONNX, GGUF, a dense GPT-2; each says how far its logits are."""
