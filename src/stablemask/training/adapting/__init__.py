"""Taking the attention sink out of a softmax model, by distillation from itself.

A softmax model puts the attention that a row does not need on a first token. With the token that serves it
best in front of each text, its *prefix* (prefix.py), the other tokens are no sink: this is the teacher. The
student reads the text without it (reading.py) and has a pseudo mass in its place, whose size in each layer and
head is the median of what the prefix was given (calibration.py). It is trained to predict what the teacher does
(divergence.py, trainer.py), while its attention on the first token and its hidden states are watched (watch.py).
It learns from text that it has written itself, from the user's, or from both (adapt.py).
"""
