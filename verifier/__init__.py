"""The verifier: owns the target model, the K/V memory and the truth. See README.md in this folder."""
