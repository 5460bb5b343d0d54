"""Twenty chat messages of varied length, from one word to a page, in several languages and scripts."""

from __future__ import annotations

_STORY = (
    "The lighthouse keeper had counted ships for thirty years, and on the evening of the storm he counted one more than had ever "
    "left the harbour. It carried no flag. Its lanterns burned green, and when he rang the bell to warn it off the rocks the "
    "bell gave no sound. He wrote the hour in his book, as the regulations asked, and went down to the shore with a rope. "
)
_RECIPE = (
    "Ingredients: 300 g flour, 2 eggs, 150 ml milk, a pinch of salt, 40 g butter. Mix the flour with the salt, make a hollow, "
    "add the eggs and stir while pouring the milk. Let the batter rest for half an hour, then bake thin cakes in the butter. "
)
_CODE = '''def merge(a, b):
    out = []
    while a and b:
        out.append(a.pop(0) if a[0] < b[0] else b.pop(0))
    return out + a + b
'''

PROMPTS = (
    "Hi!",
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "List the first ten prime numbers.",
    "Écris une phrase sur la mer.",
    "Translate to German: The train leaves at seven in the morning.",
    "12 * 7 + 5 = ?",
    "日本の首都はどこですか。",
    "Write a haiku about autumn leaves 🍂.",
    "Explain to a ten-year-old how a rainbow comes about, and why it is curved.",
    "Give me three names for a grey cat, and say in one line each why they fit.",
    f"What does this Python function do, and what is wrong with its running time?\n\n```python\n{_CODE}```",
    f"Summarise in one sentence:\n\n{_RECIPE}",
    f"Turn this recipe into a numbered list of steps, and name what it makes.\n\n{_RECIPE}",
    f"Continue the story in the same tone.\n\n{_STORY}",
    "Compare tea and coffee under these headings: taste, caffeine, history, health, price. Keep every heading to one line. " * 2,
    f"Who speaks, and where does it happen?\n\n{_STORY}{_RECIPE}",
    f"Find the odd sentence out.\n\n{_RECIPE}{_STORY}{_RECIPE}",
    f"{_STORY * 3}\n\nHow many times was the text above repeated?",
    f"{_RECIPE * 3}{_STORY * 4}\n\nWhich of the two texts comes first, and how long is it in words, roughly?",
)
