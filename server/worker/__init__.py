"""Everything that lives in the GPU process, but for drafters/ and verifier/."""
