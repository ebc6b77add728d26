"""The CTC drafter: a light head over the target's hidden states that guesses several tokens in one pass."""
