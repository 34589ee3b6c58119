import random

WORDS = 400


def prose(n_bytes: int, seed: int = 0) -> str:
    """Sentences of made-up words, some not ASCII, with a number in each so that none occurs twice."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioulnrstdémø", k=rng.randint(2, 8))) for _ in range(WORDS)]
    sentences, size = [], 0
    while size < n_bytes:
        sentences.append(f"{' '.join(rng.choices(words, k=12))} {len(sentences)}.{rng.choice([' ', chr(10)])}")
        size += len(sentences[-1].encode())
    return "".join(sentences)
