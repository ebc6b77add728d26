"""Attention back ends by name; a name resolves to "module:Class" only when it is chosen."""

REGISTRY: dict[str, str] = {
    "reference": "verifier.attention.reference:ReferenceAttention",
    "native": "verifier.attention.native:NativeAttention",
    "sdpa": "verifier.attention.sdpa:SdpaAttention",
    "triton": "verifier.attention.triton:TritonAttention",
}
